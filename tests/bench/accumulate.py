"""What captions hold between the sub-batches of a step, beside open_clip's CoCa.

    python -m tests.bench accumulate

Bytes that tensors took from the first sub-batch's beginning to the last one's, by torch's profiler,
for each sample in between. Ours is the accumulation step with no graph kept and a caption task; the
peer is ``train_one_epoch`` with ``--accum-freq``, which keeps what the loss will want of each
sub-batch: features, and logits of all 77 columns over its 49,408 tokens.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

import engine.torchvision_ops  # noqa: F401  before open_clip, which imports torchvision

from open_clip.loss import CoCaLoss  # isort: skip
from engine.config import schema
from engine.losses.language_model import IGNORED
from engine.train.precision import Precision
from engine.train.steps import dga
from tests.bench.generation import configured, make_coca, with_decoder
from tests.bench.peer import CPU, Limited
from tests.bench.runs import make_run
from tests.bench.table import Line, Options
from tests.bench.text import make_batch, padded
from tests.train.tiny import replicas

_MARK = "a sub-batch begins"


class Enough(Exception):
    """The last sub-batch has begun."""


def held(work: Callable[[], Any], model: nn.Module, parts: int) -> int:
    """Bytes that tensors hold when the ``parts``-th call of the model begins and not at the first.

    ``work`` is broken off there.
    """
    calls = 0

    def before(module: nn.Module, *inputs: Any) -> None:
        nonlocal calls
        calls += 1
        with record_function(_MARK):
            pass
        if calls == parts:
            raise Enough

    handle = model.register_forward_pre_hook(before)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            work()
    except Enough:
        pass
    finally:
        handle.remove()
    events = sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    total, at_marks = 0, []
    for event in events:
        if event.name() == _MARK:
            at_marks.append(total)
        elif event.name() == "[memory]":
            total += event.nbytes()
    assert len(at_marks) == parts, at_marks
    return at_marks[-1] - at_marks[0]


def ours(config: schema.Config, rows: int, parts: int, size: int) -> tuple[Callable, nn.Module]:
    """The accumulation step over captions in ``parts`` sub-batches of ``rows``."""
    run = make_run(config, "caption")
    model, vocabulary = run.build_model(), run.tokenizer.vocab_size
    batch = make_batch(rows * parts, size, vocabulary)
    ids_BT, mask_BT = batch["input_ids_BT"], batch["attention_mask_BT"]
    batch["labels_BT"] = ids_BT.masked_fill(mask_BT == 0, IGNORED)
    step = dga.build(
        schema.Runner(keep_graphs=0),
        schema.Data(batch_size_train=rows),
        task=run.task,
        model=replicas(model),
        precision=Precision("fp32", CPU),
        device=CPU,
    )
    return lambda: step(batch, 0), model


def theirs(
    config: schema.Config, rows: int, parts: int, size: int, vocabulary: int
) -> tuple[Callable, nn.Module]:
    """One step of open_clip's loop over as many sub-batches."""
    from open_clip_train.train import train_one_epoch

    model = make_coca(config, vocabulary, size)
    batch = padded(make_batch(rows * parts, size, vocabulary))
    image_BCHW = (batch["image_BCHW"].float() - 127.5) / 127.5
    pairs: Any = list(zip(image_BCHW.split(rows), batch["input_ids_BT"].split(rows), strict=True))
    data = {"train": Limited(DataLoader(pairs, batch_size=None), parts)}
    args = Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=parts, skip_scheduler=True,
        horovod=False, grad_clip_norm=None, rank=0, local_rank=0, world_size=1, batch_size=rows,
        log_every_n_steps=100, wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    loss = CoCaLoss(2.0, 1.0)

    def work() -> None:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)

    return work, model


def rows(options: Options) -> Iterator[Line]:
    """Bytes a sample."""
    count, parts, vocabulary = (2, 3, 1000) if options.quick else (8, 4, 49_408)
    with tempfile.TemporaryDirectory() as name:
        config = with_decoder(configured(options, Path(name)), max_length=77)
        between = count * (parts - 1)
        size = 64
        mine = held(*ours(config, count, parts, size), parts) / between
        peer = held(*theirs(config, count, parts, size, vocabulary), parts) / between
        yield Line("held between sub-batches, a sample, CoCa's ÷ ours", mine, peer,
                   ratio=peer / mine, mark="≥ 20", unit="bytes")  # fmt: skip
