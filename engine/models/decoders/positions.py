"""Positions that a decoder is given, for models which count places in a row by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_LEARNED = ("embed_positions", "wpe")  # names of tables of positions: OPT and the like, GPT-2


class GivenPositions:
    """Learned positions for text alone, and ALiBi (arXiv 2108.12409) by the positions of keys.

    Learned: behind images of N tokens, position N is the text's 0. Image tokens get no position:
    they keep the order that the image encoder gave them. A table keeps its name and weights; its
    output is changed within ``at`` alone.

    ALiBi, of MPT: the bias of a head is its slope times the key's position, since softmax does not
    change with a constant.
    """

    def __init__(self, model: Any, base: Any) -> None:
        self.num_image_B: Tensor | None = None  # None: tables are as they were
        self.key_position_BS: Tensor | None = None  # None: MPT counts places
        self.takes_ids = "position_ids" in inspect.signature(base.forward).parameters
        self.tables = [
            module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in _LEARNED and isinstance(module, nn.Embedding)
        ]
        for table in self.tables:
            table.forward = self._of_text(table.forward)  # type: ignore[method-assign]
        self.has_alibi = hasattr(base, "build_mpt_alibi_tensor")
        if self.has_alibi:
            base.build_mpt_alibi_tensor = self._biases(base.build_mpt_alibi_tensor)

    @contextmanager
    def at(self, num_image_B: Tensor, key_position_BS: Tensor | None = None) -> Iterator[None]:
        """Within the block, positions are counted behind each row's number of image tokens, and
        MPT's keys have ``key_position_BS``."""
        self.num_image_B, self.key_position_BS = num_image_B, key_position_BS
        try:
            yield
        finally:
            self.num_image_B = self.key_position_BS = None

    def _of_text(self, forward: Any) -> Callable[..., Tensor]:
        signature = inspect.signature(forward)
        takes = signature.parameters
        name = "position_ids" if "position_ids" in takes else next(iter(takes))

        def look_up(*args: Any, **kwargs: Any) -> Tensor:
            if self.num_image_B is None:
                return forward(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            position_BT = bound.arguments[name] - self.num_image_B[:, None]
            bound.arguments[name] = position_BT.clamp_min(0)
            found_BTD = forward(*bound.args, **bound.kwargs)
            return found_BTD * (position_BT >= 0).unsqueeze(-1).to(found_BTD.dtype)

        return look_up

    def _biases(self, plain: Any) -> Callable[..., Any]:
        def biases(num_heads: int, length: int, **options: Any) -> Any:
            if self.key_position_BS is None:
                return plain(num_heads, length, **options)
            two_H12 = plain(num_heads, 2, **options)
            slope_H1 = two_H12[..., 1] - two_H12[..., 0]
            return _Biases(slope_H1[..., None] * self.key_position_BS[:, None, None])

        return biases


class _Biases:
    """Biases [B, H, 1, S] in place of MPT's [H, 1, S], which are the same for all rows.

    MPT's layers cut theirs to the lengths that they meet, by arithmetic that torch.export cannot
    follow; these have their length already.
    """

    def __init__(self, bias_BH1S: Tensor) -> None:
        self.bias_BH1S, self.shape = bias_BH1S, bias_BH1S.shape[1:]

    def size(self, axis: int) -> int:
        return 1

    def __getitem__(self, part: Any) -> Tensor:
        return self.bias_BH1S
