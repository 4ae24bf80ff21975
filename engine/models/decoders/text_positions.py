"""Learned positions where images stand before a text: they are the text's alone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

_LEARNED = ("embed_positions", "wpe")  # names of tables of positions: OPT and its kin, GPT-2


class TextPositions:
    """Learned positions for text alone: behind images of N tokens, position N is the text's 0.

    The table is left as it is, with its name and weights; its answers are bent while in use. Image
    tokens get no position: they keep the order that the image encoder gave them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_image_B: Tensor | None = None  # None: the table answers as ever
        self.tables = [
            module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in _LEARNED and isinstance(module, nn.Embedding)
        ]
        for table in self.tables:
            forward = table.forward
            table.forward = self._wrapped(forward)  # type: ignore[method-assign]

    def after(self, num_image_B: Tensor) -> _After:
        """Within the block, positions are counted behind each row's number of image tokens."""
        return _After(self, num_image_B)

    def _wrapped(self, forward: Any) -> Any:
        takes = inspect.signature(forward).parameters

        def look_up(*args: Any, **kwargs: Any) -> Tensor:
            if self.num_image_B is None:
                return forward(*args, **kwargs)
            bound = inspect.signature(forward).bind(*args, **kwargs)
            name = "position_ids" if "position_ids" in takes else next(iter(takes))
            position_BT = bound.arguments[name] - self.num_image_B[:, None]
            bound.arguments[name] = position_BT.clamp_min(0)
            found_BTD = forward(*bound.args, **bound.kwargs)
            return found_BTD * (position_BT >= 0).unsqueeze(-1).to(found_BTD.dtype)

        return look_up


class _After:
    def __init__(self, positions: TextPositions, num_image_B: Tensor) -> None:
        self.positions, self.num_image_B = positions, num_image_B

    def __enter__(self) -> None:
        self.positions.num_image_B = self.num_image_B

    def __exit__(self, *error: object) -> None:
        self.positions.num_image_B = None
