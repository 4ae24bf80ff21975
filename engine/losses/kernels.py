"""Triton kernels for bf16 features on CUDA: a product and all that follows it in one launch.

Each program computes one block of z = scale · I Tᵀ + bias in fp32 registers, and only what is
needed of it goes to memory: sums by row and column, or P − Y rounded to bf16 after the subtraction.
Imported only where Triton is installed and a GPU is used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(
    image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP: tl.constexpr
):
    """One block of z; rows and columns beyond the ends hold anything."""
    within = tl.arange(0, STEP)
    image_rows = image + rows.to(tl.int64)[:, None] * width
    text_rows = text + columns.to(tl.int64)[None, :] * width
    z = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, width, STEP):
        d = start + within
        image_part = tl.load(
            image_rows + d[None, :],
            mask=(rows < num_rows)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        text_part = tl.load(
            text_rows + d[:, None],
            mask=(columns < num_columns)[None, :] & (d < width)[:, None],
            other=0.0,
        )
        z = tl.dot(image_part, text_part, z)
    return z * tl.load(scale) + tl.load(bias)


@triton.jit
def _positions(row_blocks, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows and columns: neighbours in launch order share columns."""
    row_block = tl.program_id(0) % row_blocks
    column_block = tl.program_id(0) // row_blocks
    rows = row_block * HEIGHT + tl.arange(0, HEIGHT)
    columns = column_block * WIDTH + tl.arange(0, WIDTH)
    return row_block, column_block, rows, columns


@triton.jit
def _targets(
    match, weights, rows, columns, num_rows, MATCHES: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Y of the block: ``match`` [MATCHES, rows] holds columns, ``weights`` [MATCHES]."""
    y = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for number in tl.static_range(MATCHES):
        column = tl.load(match + number * num_rows + rows, mask=rows < num_rows, other=-1)
        y += tl.where(column[:, None] == columns[None, :], tl.load(weights + number), 0.0)
    return y


@triton.jit
def log_sums(
    image, text, scale, bias, row_parts, column_parts, num_rows, num_columns, width, row_blocks,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Each block's log Σ exp by row → row_parts [column blocks, rows], and by column likewise."""
    row_block, column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    z = tl.where(valid, z, -1e30)  # finite, so that a block's edge gives no NaN
    peak = tl.max(z, 1)
    sums = tl.log(tl.sum(tl.exp(z - peak[:, None]), 1)) + peak
    tl.store(row_parts + column_block * num_rows + rows, sums, mask=rows < num_rows)
    peak = tl.max(z, 0)
    sums = tl.log(tl.sum(tl.exp(z - peak[None, :]), 0)) + peak
    tl.store(column_parts + row_block * num_columns + columns, sums, mask=columns < num_columns)


@triton.jit
def softmax_excess(
    image, text, scale, bias, row_sums, column_sums, match, weights, out,
    to_text, to_image, uniform, num_rows, num_columns, width, row_blocks,
    MATCHES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """to_text · exp(z − row sum) + to_image · exp(z − column sum) − Y − uniform, in out's dtype."""
    _row_block, _column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    row_sum = tl.load(row_sums + rows, mask=rows < num_rows, other=0.0)
    column_sum = tl.load(column_sums + columns, mask=columns < num_columns, other=0.0)
    p = to_text * tl.exp(z - row_sum[:, None]) + to_image * tl.exp(z - column_sum[None, :])
    y = _targets(match, weights, rows, columns, num_rows, MATCHES, HEIGHT, WIDTH)
    place = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(place, (p - y - uniform).to(out.dtype.element_ty), mask=valid)


@triton.jit
def sigmoid_excess(
    image, text, scale, bias, match, weights, losses, sums, out,
    num_rows, num_columns, width, row_blocks,
    MATCHES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """σ(z) − Y in out's dtype; each program's Σ softplus(z) and Σ (σ(z) − Y)."""
    _row_block, _column_block, rows, columns = _positions(row_blocks, HEIGHT, WIDTH)
    z = _logits(image, text, scale, bias, rows, columns, num_rows, num_columns, width, STEP)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    small = tl.exp(-tl.abs(z))
    # log(1 + e) loses a small e; its series does not
    log1p = tl.where(small < 1e-3, small * (1 - small * (0.5 - small / 3)), tl.log(1 + small))
    softplus = tl.where(valid, tl.maximum(z, 0.0) + log1p, 0.0)
    sigmoid = tl.where(z >= 0, 1.0, small) / (1 + small)
    y = _targets(match, weights, rows, columns, num_rows, MATCHES, HEIGHT, WIDTH)
    excess = tl.where(valid, sigmoid - y, 0.0)
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(softplus, 1), 0))
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(excess, 1), 0))
    place = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(place, excess.to(out.dtype.element_ty), mask=valid)
