"""A token a byte: needs neither files nor training, and knows every text. 260 ids."""

from collections.abc import Callable, Iterator

from engine.config import schema
from engine.data.text.tokenizer import BYTE_TOKENS, TextTokenizer, byte_level


def build(
    config: schema.Tokenizer, *, captions: Callable[[], Iterator[str]] | None = None
) -> TextTokenizer:
    """The byte tokenizer; it has no options."""
    return TextTokenizer(byte_level(split_words=False), BYTE_TOKENS)
