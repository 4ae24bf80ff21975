"""Which tokenizer a run has: the one saved with it, else the one that its configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine import registry
from engine.config.schema import Config
from engine.data.text.tokenizer import TextTokenizer, is_saved, load

FOLDER = "tokenizer"  # of a run's folder


def choose_tokenizer(
    config: Config,
    run_dirs: list[Path],
    captions: Callable[[], Iterator[str]] | None,
    part: str = "text_encoder",
) -> TextTokenizer:
    """The first tokenizer saved in ``run_dirs``; else a new one.

    It is that of ``model.PART`` (``text_encoder``, ``decoder``): ``auto`` is the part's own where
    it has a ``tag``, and bytes where it is built from sizes alone. ``captions`` are what a trained
    one learns from.
    """
    for folder in run_dirs:
        if is_saved(folder / FOLDER):
            return load(folder / FOLDER)
    model = getattr(config.model, part)
    chosen, key = model.tokenizer, f"model.{part}.tokenizer.name"
    name = chosen.name
    if name == "auto":
        name = "huggingface" if model.tag else "bytes"
    if name == "huggingface" and chosen.tag is None:
        chosen = chosen.model_copy(update={"tag": model.tag})
    return registry.build(
        "data/text", name, chosen, captions=captions, key=key, options=config.options
    )
