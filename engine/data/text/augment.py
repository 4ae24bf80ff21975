"""Text augmentation in training: words masked, replaced at random, or left out.

After ZeroVL (arXiv 2112.09331), where a fifth of the word pieces is touched. The rates
are shares of word pieces, met on average. Draws are per word: all of its pieces share its
fate, so that no word is half masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config.schema import TextAugment
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError

_KEY = "transforms.text_augment"


class WordBoundaries(NamedTuple):
    """Which ids begin a word, and which end one: two tables over the vocabulary.

    A word begins at an id of ``starts_V``, after an id of ``ends_V``, and at the first real token.
    """

    starts_V: Tensor
    ends_V: Tensor


def word_boundaries(pieces: Sequence[str]) -> WordBoundaries:
    """From the vocabulary's spelling, ``pieces[i]`` being id i's.

    Knows WordPiece (``##`` continues a word), byte-level BPE (``Ġ`` begins one) and SentencePiece
    (``▁`` begins one), CLIP's BPE (``</w>`` ends one) and plain spaces. The convention that most
    pieces follow counts; where none does, each piece is a word.
    """

    def is_marked(piece: str, mark: str) -> bool:
        return piece.endswith(mark) if mark == "</w>" else piece.startswith(mark)

    marks = ("##", "Ġ", "▁", "</w>", " ")
    marked_V = {mark: torch.tensor([is_marked(p, mark) for p in pieces]) for mark in marks}
    mark = max(marks, key=lambda name: int(marked_V[name].sum()))
    nothing_V = torch.zeros(len(pieces), dtype=torch.bool)
    if not marked_V[mark].any():
        return WordBoundaries(~nothing_V, nothing_V)
    if mark == "</w>":
        return WordBoundaries(nothing_V, marked_V[mark])
    return WordBoundaries(~marked_V[mark] if mark == "##" else marked_V[mark], nothing_V)


class TextAugmenter:
    """Masks, replaces and leaves out words of tokenised captions; special tokens stay.

    Args:
        rates: shares of the words; each word meets at most one of the three fates.
        tokenizer: its special ids are never touched nor drawn; a masked piece becomes ``mask_id``.
            How it spells its pieces says where words begin.

    Raises UserError for rates above one in sum, and for masking without a mask token.
    """

    def __init__(self, rates: TextAugment, tokenizer: TextTokenizer) -> None:
        if rates.mask + rates.random + rates.delete > 1 + 1e-9:
            raise UserError(
                f"mask {rates.mask}, random {rates.random} and delete {rates.delete} are shares "
                "of the same words: together at most 1",
                key=_KEY,
            )
        if rates.mask and tokenizer.mask_id is None:
            raise UserError(
                "the tokenizer has no mask token: set mask: 0, or use another tokenizer",
                key=f"{_KEY}.mask",
            )
        self.rates = rates
        self.active = rates.mask + rates.random + rates.delete > 0
        self.pad_id = tokenizer.pad_id
        self.mask_id = tokenizer.mask_id
        pieces = tokenizer.pieces
        self.boundaries = word_boundaries(pieces)
        self.special_V = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        special = [*tokenizer.special_ids, tokenizer.pad_id]
        self.special_V[[i for i in special if 0 <= i < tokenizer.vocab_size]] = True
        used_V = torch.tensor([piece != "" for piece in pieces])
        self.ordinary = (used_V & ~self.special_V).nonzero().squeeze(1)

    def __call__(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Augmented ids and mask, int64, as long as the longest row that is left.

        A caption's fate depends on its own seed alone, whatever else is in the batch. At least one
        word of a row that has any is kept.
        """
        rates = self.rates
        if not self.active:
            return input_ids_BT, attention_mask_BT
        real_BT = attention_mask_BT.bool()
        draw_BT, other_BT = self._draw(real_BT, seeds)
        text_BT = real_BT & ~self.special_V[input_ids_BT]
        first_BT, draw_BT = self._by_word(input_ids_BT, text_BT, draw_BT)
        masked_BT = text_BT & (draw_BT < rates.mask)
        random_BT = text_BT & ~masked_BT & (draw_BT < rates.mask + rates.random)
        deleted_BT = text_BT & ~masked_BT & ~random_BT
        deleted_BT &= draw_BT < rates.mask + rates.random + rates.delete
        deleted_BT &= ~self._spared(first_BT, text_BT, deleted_BT, draw_BT)
        ids_BT = torch.where(random_BT, other_BT, input_ids_BT)
        if self.mask_id is not None:
            ids_BT = ids_BT.masked_fill(masked_BT, self.mask_id)
        return self._compact(ids_BT, real_BT & ~deleted_BT)

    def _draw(self, real_BT: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A number in [0, 1) and a replacement for each real token, row after row.

        As many numbers are drawn for a row as it has tokens, however far it is padded.
        """
        draw_BT = torch.ones(real_BT.shape, dtype=torch.float64)
        other_BT = torch.zeros(real_BT.shape, dtype=torch.int64)
        generator = torch.Generator()
        for row, length in enumerate(real_BT.sum(1).tolist()):
            generator.manual_seed(seeds[row])
            both = torch.rand(2, length, dtype=torch.float64, generator=generator)
            draw_BT[row, real_BT[row]] = both[0]
            choice = (both[1] * len(self.ordinary)).long()
            other_BT[row, real_BT[row]] = self.ordinary[choice]
        return draw_BT, other_BT

    def _by_word(self, ids_BT: Tensor, text_BT: Tensor, draw_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Position of each piece's word, and that word's draw."""
        before_BT = torch.zeros_like(text_BT)
        before_BT[:, 1:] = text_BT[:, :-1] & ~self.boundaries.ends_V[ids_BT[:, :-1]]
        begins_BT = self.boundaries.starts_V[ids_BT] | ~before_BT
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        first_BT = torch.where(begins_BT, positions_BT, 0).cummax(1).values
        return first_BT, draw_BT.gather(1, first_BT)

    @staticmethod
    def _spared(first_BT: Tensor, text_BT: Tensor, deleted_BT: Tensor, draw_BT: Tensor) -> Tensor:
        """In rows that would lose every word, the pieces of the word nearest to being kept."""
        emptied_B1 = (deleted_BT == text_BT).all(1, keepdim=True)
        best_B1 = draw_BT.masked_fill(~text_BT, -1.0).argmax(1, keepdim=True)
        return emptied_B1 & text_BT & (first_BT == first_BT.gather(1, best_B1))

    def _compact(self, ids_BT: Tensor, kept_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Kept tokens to the front in their order, and no longer than the longest row."""
        order_BT = (~kept_BT).to(torch.uint8).argsort(dim=1, stable=True)
        counts_B1 = kept_BT.sum(1, keepdim=True)
        longest = int(counts_B1.max()) if len(counts_B1) else 0
        mask_BT = torch.arange(longest) < counts_B1
        ids_BT = ids_BT.gather(1, order_BT)[:, :longest].masked_fill(~mask_BT, self.pad_id)
        return ids_BT, mask_BT.long()
