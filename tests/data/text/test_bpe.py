"""Byte-pair encoding trained on captions."""

import itertools
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.schema import Tokenizer as Config
from engine.data.text import bpe
from engine.data.text.tokenizer import load
from engine.errors import UserError

_CAPTIONS = [
    f"{n} {size} {colour} {shape} to the left of one large blue square"
    for n in ("one", "two")
    for size in ("small", "large")
    for colour in ("red", "green")
    for shape in ("circle", "star")
] * 3


def _bpe(captions=_CAPTIONS, vocab_size=400):
    return bpe.build(Config(vocab_size=vocab_size), captions=lambda: iter(captions))


_TRAINED = _bpe()


def _text(tokenizer, ids):
    return tokenizer.tokenizer.decode([int(i) for i in ids])


def test_bpe_learns_the_words_and_lower_cases():
    tokenizer = _bpe()
    ids, _ = tokenizer(["Two RED circle"], 25)
    assert ids.shape == (1, 5)  # a piece a word
    assert _text(tokenizer, ids[0]).strip() == "two red circle"
    assert tokenizer.vocab_size <= 400
    assert (tokenizer.pad_id, tokenizer.mask_id) == (0, 3)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    assert "Ġcircle" in tokenizer.pieces


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bpe_knows_every_text(text):
    ids, _ = _TRAINED([text], 10_000)
    expected = unicodedata.normalize("NFC", text).lower()
    assert _text(_TRAINED, ids[0]).removeprefix(" ") == expected.removeprefix(" ")


def test_bpe_vocabulary_is_bounded():
    assert _bpe(vocab_size=270).vocab_size == 270
    with pytest.raises(UserError, match=r"vocab_size 100 is too small.*260") as caught:
        _bpe(vocab_size=100)
    assert caught.value.key == "model.text_encoder.tokenizer.vocab_size"


def test_bpe_trains_on_cleaned_captions():
    dirty = [text.replace("circle", "cafÃ©") for text in _CAPTIONS]
    ids, _ = _bpe(captions=dirty)(["one café"], 25)
    assert ids.shape == (1, 4)


def test_bpe_is_saved_and_read_back(tmp_path):
    first = _bpe()
    with pytest.raises(UserError, match="no saved tokenizer"):
        load(tmp_path / "tokenizer")
    first.save(tmp_path / "tokenizer")
    again = load(tmp_path / "tokenizer")
    assert again.pieces == first.pieces
    assert torch.equal(again(_CAPTIONS, 25)[0], first(_CAPTIONS, 25)[0])


def test_bpe_without_captions():
    with pytest.raises(UserError, match="trained on the captions, and none is saved here"):
        bpe.build(Config(), captions=None)


_WORDS = ("red", "green", "blue", "small", "large", "circle", "square", "left", "above", "below")
_TRAIN_AND_FORK = """
import itertools, os, sys
from engine.config.schema import Tokenizer
from engine.data.text import bpe
captions = [" ".join(words) for words in itertools.product(sys.argv[1:], repeat=3)]
tokenizer = bpe.build(Tokenizer(vocab_size=500), captions=lambda: iter(captions))
print("\\n".join(tokenizer.pieces), flush=True)
child = os.fork()
if not child:
    tokenizer(["red circle left"] * 64, 25)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_bpe_is_deterministic_and_works_in_forked_workers():
    """Captions full of equally frequent pairs; no warning about forks."""
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    other = subprocess.run(
        [sys.executable, "-c", _TRAIN_AND_FORK, *_WORDS],
        capture_output=True, text=True, check=True, timeout=60,
        cwd=Path(__file__).parents[3], env=environment,
    )  # fmt: skip
    captions = [" ".join(words) for words in itertools.product(_WORDS, repeat=3)]
    assert other.stdout.splitlines() == _bpe(captions=captions, vocab_size=500).pieces
    assert other.stderr == ""
