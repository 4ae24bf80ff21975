"""Byte-pair encoding trained on the captions (Sennrich et al. 2016, arXiv:1508.07909).

Byte-level, so that no text is unknown; lower-cased, because captions are small data.
"""

from __future__ import annotations

import os

from tokenizers import normalizers, trainers

from engine.config import schema
from engine.data.text.tokenizer import (
    BYTE_TOKENS,
    BYTES,
    Captions,
    TextTokenizer,
    byte_level,
    clean,
)
from engine.errors import UserError

_KEY = "model.text_encoder.tokenizer"
_MIN_VOCABULARY = len(BYTE_TOKENS) + len(BYTES)


def build(config: schema.Tokenizer, *, captions: Captions = None) -> TextTokenizer:
    """A tokenizer trained on ``captions()``, of at most ``config.vocab_size`` ids.

    The same captions in the same order give the same tokenizer. Raises UserError without captions,
    or for a vocabulary too small to hold every byte.
    """
    if captions is None:
        raise UserError(
            "tokenizer 'bpe' is trained on the captions, and none is saved here; "
            "train with data.train_name, or resume the run that has it",
            key=f"{_KEY}.name",
        )
    if config.vocab_size < _MIN_VOCABULARY:
        raise UserError(
            f"vocab_size {config.vocab_size} is too small: "
            f"bytes and special tokens alone take {_MIN_VOCABULARY}",
            key=f"{_KEY}.vocab_size",
        )
    tokenizer = byte_level(split_words=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(BYTE_TOKENS.values()),
        initial_alphabet=BYTES,
    )
    tokenizer.train_from_iterator(map(clean, captions()), trainer)
    # Training used threads; data workers forked after it must not, and the library would warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TextTokenizer(tokenizer, BYTE_TOKENS)
