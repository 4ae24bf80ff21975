"""transformers' loading and logging, as the text encoders want them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip


def cached_first(auto: Any, tag: str | None, **options: Any) -> Any:
    """Load without asking the hub where that suffices: offline its retries take most of a minute.

    Code that comes with a model is never run.
    """
    try:
        return auto.from_pretrained(tag, local_files_only=True, trust_remote_code=False, **options)
    except OSError:
        return auto.from_pretrained(tag, trust_remote_code=False, **options)


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers' warnings held back within the block."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
