"""A token a byte: needs neither files nor training, and knows every text. 260 ids."""

from collections.abc import Callable, Iterator

from engine.config import schema
from engine.data.text.tokenizer import TextTokenizer, byte_level, with_ends


def build(
    config: schema.Tokenizer, *, captions: Callable[[], Iterator[str]] | None = None
) -> TextTokenizer:
    """The byte tokenizer; it has no options."""
    return with_ends(byte_level(split_words=False))
