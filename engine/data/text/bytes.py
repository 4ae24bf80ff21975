"""A token a byte: needs neither files nor training, and knows every text. 260 ids."""

from engine.config import schema
from engine.data.text.tokenizer import BYTE_TOKENS, Captions, TextTokenizer, byte_level


def build(config: schema.Tokenizer, *, captions: Captions = None) -> TextTokenizer:
    """The byte tokenizer; it has no options."""
    return TextTokenizer(byte_level(split_words=False), BYTE_TOKENS)
