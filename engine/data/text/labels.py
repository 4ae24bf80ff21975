"""Labels of an image as a row of tokens: a prompt, then each label with its separator.

Labels come from a dataset's lists, or are the nouns of its captions. Nouns are found by HanTa
(Wartena 2019, the Hanover Tagger), whose English model comes with it: kept are common nouns, left
out are proper names, words with digits, and single letters. How a label is spelled in tokens is
read off the tokenizer, behind the prompt; no token is known by its number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from engine.config.schema import Labels
from engine.data.permutation import hash64
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError
from engine.types import BadSample, Batch, Row

_KEY = "data.labels"
_SAMPLE_LABEL = "thing"  # to see how a label and its separator are tokenized
_NOUNS = ("NN0", "NN1", "NN2")  # of the BNC's tags: people, dog, dogs
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:!?]")
_KEPT = 1 << 15  # captions and words whose analyses are kept: each epoch has them again


def clean(labels: Iterable[str]) -> list[str]:
    """Labels in small letters with plain spaces, each once, in their order; no empty ones."""
    plain = (" ".join(label.replace("_", " ").lower().split()) for label in labels)
    return list(dict.fromkeys(label for label in plain if label))


def labels_of(row: Row, section: Labels) -> list[str]:
    """The cleaned labels of a row; none where it has none."""
    if section.source == "given":
        return clean(row.labels)
    return [noun for noun in clean(nouns(row.caption)) if noun not in section.leave_out]


@functools.cache
def _tagger() -> Any:
    """The English tagger. Raises UserError where HanTa is not installed."""
    try:
        from HanTa import HanoverTagger
    except ImportError as error:
        raise UserError(
            f"nouns of captions need HanTa ({error}): pip install 'vision-language-engine"
            "[recognize]'",
            key=f"{_KEY}.source",
        ) from error
    # by its whole path: HanTa looks into the working folder first
    model = Path(HanoverTagger.__file__).with_name("morphmodel_en.pgz")
    return HanoverTagger.HanoverTagger(str(model))


@functools.lru_cache(_KEPT)
def nouns(caption: str) -> tuple[str, ...]:
    """Lemmas of a caption's common nouns, in small letters, each once, in their order."""
    found = (
        lemma.lower().rstrip("'’")  # a genitive's apostrophe remains
        for word, lemma, tag in _tagger().tag_sent(
            _WORD.findall(caption.lower()), casesensitive=False
        )
        if tag in _NOUNS and len(word) > 1 and not any(letter.isdigit() for letter in word)
    )
    return tuple(dict.fromkeys(found))


@functools.lru_cache(_KEPT)
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


class LabelRow(NamedTuple):
    """One row of text, each list as long as it has tokens; see ``PrefixDecoder``."""

    ids: list[int]
    segment: list[int]  # 0 of the prompt, i ≥ 1 of label i
    position: list[int]
    source: list[int]  # the place whose state predicts the token; −1: not learned
    unseen: list[int]


def lay_out(
    prompt: Sequence[int], labels: Sequence[Sequence[int]], *, nxtp: bool, per_label: bool
) -> LabelRow:
    """A prompt and labels, each ending with the separator, as one row.

    Each label's first token is predicted by the prompt's last state. By NXTP's rule (``nxtp``) it
    is predicted by the separator before it instead, the last label has no separator, and no other
    place attends to the tokens of that one.
    """
    start = len(prompt)
    row = LabelRow(list(prompt), [0] * start, list(range(start)), [-1] * start, [0] * start)
    for number, label in enumerate(labels, 1):
        last = nxtp and number == len(labels)
        tokens, place = label[: len(label) - last], len(row.ids)
        row.ids.extend(tokens)
        row.segment.extend([number] * len(tokens))
        first = start if per_label else place
        row.position.extend(range(first, first + len(tokens)))
        row.source.extend(range(place - 1, place - 1 + len(tokens)))
        if not nxtp:
            row.source[place] = start - 1
        row.unseen.extend([int(last)] * len(tokens))
    return row


def stack(rows: Sequence[LabelRow], pad_id: int) -> Batch:
    """Rows as int64 tensors [B, T], padded to the longest one; ``unseen_BT`` where anything is."""
    ids_BT, segment_BT, position_BT, source_BT, unseen_BT = (
        pad_sequence(list(map(torch.tensor, lists)), batch_first=True, padding_value=filling)
        for lists, filling in zip(zip(*rows, strict=True), (pad_id, 0, 0, -1, 0), strict=True)
    )
    lengths_B = torch.tensor([len(row.ids) for row in rows])
    batch = {
        "input_ids_BT": ids_BT,
        "attention_mask_BT": (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long(),
        "segment_BT": segment_BT,
        "position_BT": position_BT,
        "source_BT": source_BT,
    }
    return batch | {"unseen_BT": unseen_BT} if unseen_BT.any() else batch


class LabelText:
    """How a tokenizer writes prompts and labels.

    Raises UserError for a separator that is not one token of its own.
    """

    def __init__(self, tokenizer: TextTokenizer, section: Labels) -> None:
        self.tokenizer, self.section = tokenizer, section
        written = f"{section.prompt} {_SAMPLE_LABEL}"
        with_end = tokenizer.raw(written + section.separator)
        without = tokenizer.raw(written)
        self._prompt = prompt = tokenizer.raw(section.prompt)
        apart = with_end[:-1] == without and without[: len(prompt)] == prompt
        if not section.separator.strip() or not apart:
            raise UserError(
                f"the separator {section.separator!r} is not one token behind a label: "
                f"{_SAMPLE_LABEL + section.separator!r} has the tokens "
                f"{[tokenizer.pieces[i] for i in with_end[len(prompt) :]]}; "
                "use a mark that the tokenizer keeps apart, such as ','",
                key=f"{_KEY}.separator",
            )
        self.separator_id = with_end[-1]
        self.ids = functools.lru_cache(1 << 14)(self._ids)

    def train_prompt(self, seed: int | None) -> str:
        """The prompt that a sample's seed draws; the fixed one without a seed."""
        choice = self.section.train_prompts
        if seed is None or not choice:
            return self.section.prompt
        return choice[hash64(seed, 0, 0, 7) % len(choice)]

    def _ids(self, label: str) -> tuple[int, ...]:
        """Ids of a label and its separator behind the prompt; BadSample where it has it inside."""
        whole = self.tokenizer.raw(f"{self.section.prompt} {label}")[len(self._prompt) :]
        if self.section.separator in label or self.separator_id in whole:
            raise BadSample(
                "separator in label",
                f"{label!r} holds {self.section.separator!r}; choose another {_KEY}.separator",
            )
        return (*whole, self.separator_id)

    def order(self, labels: Sequence[str], seed: int | None) -> list[str]:
        """Labels shuffled by a sample's seed; as they are without one."""
        if seed is None:
            return list(labels)
        return [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]
