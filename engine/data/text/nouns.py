"""Nouns of English captions, each in its singular, by HanTa: a tagger whose model comes with it.

HanTa (Wartena 2019, the Hanover Tagger) tags by a hidden Markov model over morphemes and gives
lemmas. Kept are common nouns; left out are proper names, words with digits, and single letters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError

_NOUNS = ("NN0", "NN1", "NN2")  # of the BNC's tags: people, dog, dogs
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:!?]")
_WORDS = 1 << 15  # whose analyses are kept
_CAPTIONS = 1 << 15  # whose nouns are kept: each epoch has them again


@functools.cache
def _tagger() -> Any:
    """The English tagger. Raises UserError where HanTa is not installed."""
    try:
        from HanTa import HanoverTagger
    except ImportError as error:
        raise UserError(
            f"nouns of captions need HanTa ({error}): pip install 'vision-language-engine"
            "[recognize]'",
            key="data.labels.source",
        ) from error
    # by its whole path: HanTa looks into the working folder first
    model = Path(HanoverTagger.__file__).with_name("morphmodel_en.pgz")
    return HanoverTagger.HanoverTagger(str(model))


@functools.lru_cache(_CAPTIONS)
def nouns(caption: str) -> tuple[str, ...]:
    """Lemmas of a caption's common nouns, in small letters, each once, in their order."""
    words = _WORD.findall(caption.lower())
    found = [
        lemma.lower().rstrip("'’")  # a genitive's apostrophe remains
        for word, lemma, tag in _tagger().tag_sent(words, casesensitive=False)
        if tag in _NOUNS and len(word) > 1 and not any(letter.isdigit() for letter in word)
    ]
    return tuple(dict.fromkeys(found))


@functools.lru_cache(_WORDS)
def singular(label: str) -> str:
    """A label with its last word in the singular: 'traffic lights' → 'traffic light'."""
    head, space, last = label.rpartition(" ")
    tags = (tag for tag, _ in _tagger().tag_word(last, casesensitive=False) if tag in _NOUNS)
    tag = next(tags, None)  # the likeliest
    if not last or tag is None:
        return label
    lemma, _ = _tagger().analyze(last, pos=tag, casesensitive=False)
    return f"{head}{space}{lemma.lower()}"


def lemmatiser() -> Callable[[str], str] | None:
    """``singular``, or None where there is no tagger."""
    try:
        _tagger()
    except UserError:
        return None
    return singular
