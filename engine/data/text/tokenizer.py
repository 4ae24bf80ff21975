"""Captions as token ids: one class for every tokenizer, saved in Hugging Face's form.

The work is done by the ``tokenizers`` library; transformers is not needed, neither to tokenize nor
to read back what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine import registry
from engine.errors import UserError

if TYPE_CHECKING:  # exported models are run where there is neither torch nor pydantic
    from torch import Tensor

    from engine.config.schema import Config

Captions = Callable[[], Iterator[str]] | None  # what a trained tokenizer learns from
FOLDER = "tokenizer"  # of a run's folder
ROLES = ("pad", "mask", "cls", "sep", "bos", "eos", "unk")
BYTE_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
_VOCABULARY, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


class TextTokenizer:
    """Token ids of captions.

    Args:
        tokenizer: does the work; its own truncation and padding are switched off.
        tokens: spelling of the special tokens by role (``pad``, ``mask``, ...), as far as known.

    Without a padding token, the end token or the unknown one pads: the attention mask hides it.
    Raises UserError where there is none of the three.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self.tokens = {role: tokens[role] for role in ROLES if tokens.get(role)}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # '[SEP]' in a caption is five characters; it does not end the text.
        tokenizer.encode_special_tokens = True
        ids = {role: i for role in self.tokens if (i := self._role_id(role)) is not None}
        pads = [ids[role] for role in ("pad", "eos", "sep", "unk") if role in ids]
        if not pads:
            raise UserError(
                "the tokenizer has no token to pad with (pad, eos, sep or unk)",
                key="model.text_encoder.tokenizer",
            )
        self.pad_id: int = pads[0]
        self.mask_id: int | None = ids.get("mask")
        added = tokenizer.get_added_tokens_decoder()
        special = (i for i, token in added.items() if token.special)
        self.special_ids = frozenset(special) | frozenset(ids.values())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1  # ids may have gaps
        self._num_added = tokenizer.num_special_tokens_to_add(is_pair=False)

    def token_id(self, token: str) -> int | None:
        """The id of the token with that spelling; None where there is none."""
        number: int | None = self.tokenizer.token_to_id(token)
        return number

    def add_special(self, token: str) -> int:
        """The id of a special token, which is added where it does not exist."""
        self.tokenizer.add_special_tokens([AddedToken(token, special=True)])
        number: int = self.tokenizer.get_vocab(with_added_tokens=True)[token]
        self.special_ids |= {number}
        self.vocab_size = max(self.vocab_size, number + 1)
        return number

    def state(self) -> dict[str, Any]:
        """All of it as plain JSON values, to be sent to other processes."""
        return {"vocabulary": self.tokenizer.to_str(), "tokens": self.tokens}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TextTokenizer:
        """The tokenizer that gave ``state()``."""
        return cls(Tokenizer.from_str(state["vocabulary"]), state["tokens"])

    def __reduce__(self) -> tuple[Any, ...]:
        return TextTokenizer.from_state, (self.state(),)

    @property
    def pieces(self) -> list[str]:
        """The vocabulary's spelling by id; empty for an id that is not used."""
        spelling = [""] * self.vocab_size
        for piece, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            spelling[i] = piece
        return spelling

    def __call__(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """``input_ids_BT`` and ``attention_mask_BT``, int64: see ``rows``."""
        import torch

        rows = self.rows(texts, max_length)
        shape = (len(rows[0]), len(rows[0][0]) if rows[0] else 0)
        ids_BT, mask_BT = (torch.tensor(each, dtype=torch.int64).view(shape) for each in rows)
        return ids_BT, mask_BT

    def rows(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and mask of each text, padded on the right to the longest.

        ``max_length`` counts the special tokens; a longer text loses words from its end and keeps
        its end token. Raises UserError where ``max_length`` leaves no room for text.
        """
        if max_length <= self._num_added:
            raise UserError(
                f"max_length {max_length} leaves no room for text: the tokenizer adds "
                f"{self._num_added} special tokens",
                key="model.text_encoder.max_length",
            )
        rows = [self._ids(text, max_length) for text in texts]
        longest = max(map(len, rows), default=0)
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        return padded, [[1] * len(row) + [0] * (longest - len(row)) for row in rows]

    def _ids(self, text: str, max_length: int) -> list[int]:
        # One text at a time: encode_batch starts threads, which forked data workers cannot use.
        encoding = self.tokenizer.encode(text)
        ids: list[int] = encoding.ids
        if len(ids) > max_length:
            special = encoding.special_tokens_mask
            num_trailing = special[::-1].index(0) if 0 in special else len(special)
            ids = ids[: max_length - num_trailing] + ids[len(ids) - num_trailing :]
        return ids or [self.pad_id]  # a row of nothing would be NaN in attention

    def _role_id(self, role: str) -> int | None:
        return self.token_id(self.tokens.get(role, ""))

    @property
    def end_id(self) -> int:
        """The token that ends a generated text. Raises UserError where there is none."""
        for role in ("eos", "sep"):
            if (i := self._role_id(role)) is not None:
                return i
        raise UserError(
            "the tokenizer has no token that ends a text (eos or sep)",
            key="model.decoder.tokenizer",
        )

    def raw(self, text: str) -> list[int]:
        """Ids of a text alone, without the tokenizer's own start and end."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids up to their end, without special tokens."""
        end = self.end_id
        ids = ids[: ids.index(end)] if end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def save(self, folder: Path) -> None:
        """Write the tokenizer; ``load`` reads it, and so does transformers' ``AutoTokenizer``."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {f"{role}_token": token for role, token in self.tokens.items()}
        for name, text in (
            (_SETTINGS, json.dumps(settings, ensure_ascii=False, indent=1)),
            (_VOCABULARY, self.tokenizer.to_str(pretty=True)),  # last: with it the folder is whole
        ):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf8")
            temporary.replace(folder / name)


def byte_level(*, split_words: bool) -> Tokenizer:
    """A BPE without merges, with start and end around a text: 4 special ids, and one a byte."""
    vocabulary = {piece: i for i, piece in enumerate([*BYTE_TOKENS.values(), *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in BYTE_TOKENS.values()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=split_words, use_regex=split_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = BYTE_TOKENS["cls"], BYTE_TOKENS["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, vocabulary[token]) for token in (start, end)],
    )
    return tokenizer


def load(folder: Path) -> TextTokenizer:
    """A tokenizer that ``save`` wrote. Raises UserError, naming the folder, where it cannot be."""
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf8"))
        vocabulary = (folder / _VOCABULARY).read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        raise UserError(f"no saved tokenizer in {folder}: {error}") from error
    try:
        tokenizer = Tokenizer.from_str(vocabulary)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder / _VOCABULARY} is damaged: {error}") from error
    return TextTokenizer(tokenizer, {role: settings.get(f"{role}_token") for role in ROLES})


def choose(
    config: Config,
    run_dirs: Sequence[Path],
    captions: Captions,
    part: str = "text_encoder",
) -> TextTokenizer:
    """The first tokenizer saved in ``run_dirs``; else a new one, of ``model.PART``.

    PART is ``text_encoder`` or ``decoder``. ``auto`` is its own tokenizer where it has a ``tag``,
    and bytes where it is built from sizes alone.
    """
    for folder in (run_dir / FOLDER for run_dir in run_dirs):
        if (folder / _VOCABULARY).is_file() and (folder / _SETTINGS).is_file():
            return load(folder)
    model = config.model.decoder if part == "decoder" else config.model.text_encoder
    chosen, name = model.tokenizer, model.tokenizer.name
    if name == "auto":
        name = "huggingface" if model.tag else "bytes"
    if name == "huggingface" and chosen.tag is None:
        chosen = chosen.model_copy(update={"tag": model.tag})
    key = f"model.{part}.tokenizer.name"
    return registry.build(
        "data/text", name, chosen, captions=captions, key=key, options=config.options
    )


def clean(text: str) -> str:
    """Text with mojibake, HTML entities and odd characters repaired (ftfy), spaces made single."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing to repair
        import ftfy  # a tenth of a second to import, and many runs never need it

        text = ftfy.fix_text(text)
    return " ".join(text.split())
