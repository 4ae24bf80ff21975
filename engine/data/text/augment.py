"""Text augmentation in training: words masked, replaced at random, or left out.

After ZeroVL (arXiv 2112.09331), where a fifth of the word pieces is touched. The rates
are shares of word pieces, met on average. Draws are per word: all of its pieces share its
fate, so that no word is half masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config.schema import TextAugment
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError


def word_boundaries(pieces: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Which ids begin a word and which end one, by the vocabulary's spelling.

    Knows WordPiece (``##`` continues a word), byte-level BPE (``Ġ`` begins one) and SentencePiece
    (``▁`` begins one), CLIP's BPE (``</w>`` ends one) and plain spaces. The convention that most
    pieces follow counts; where none does, each piece is a word. The first token always begins one.
    """
    marked: dict[str, list[bool]] = {}
    for mark in ("##", "Ġ", "▁", "</w>", " "):
        has_mark = str.endswith if mark == "</w>" else str.startswith
        marked[mark] = [has_mark(piece, mark) for piece in pieces]
    mark = max(marked, key=lambda mark: sum(marked[mark]))  # the first where none is in use
    marked_V = torch.tensor(marked[mark])
    if mark == "</w>":
        return torch.zeros_like(marked_V), marked_V
    return ~marked_V if mark == "##" else marked_V, torch.zeros_like(marked_V)


class TextAugmenter:
    """Masks, replaces and leaves out words of tokenised captions; each meets at most one fate.

    Special ids of the tokenizer are never touched nor drawn; a masked piece becomes ``mask_id``.
    Raises UserError for masking without a mask token.
    """

    def __init__(self, rates: TextAugment, tokenizer: TextTokenizer) -> None:
        if rates.mask and tokenizer.mask_id is None:
            raise UserError(
                "the tokenizer has no mask token: set mask: 0, or use another tokenizer",
                key="transforms.text_augment.mask",
            )
        self.rates, self.pad_id, self.mask_id = rates, tokenizer.pad_id, tokenizer.mask_id
        self.active = rates.mask + rates.random + rates.delete > 0
        pieces = tokenizer.pieces
        self.starts_V, self.ends_V = word_boundaries(pieces)
        self.special_V = torch.zeros(len(pieces), dtype=torch.bool)
        self.special_V[[*tokenizer.special_ids, tokenizer.pad_id]] = True
        used_V = torch.tensor([piece != "" for piece in pieces])
        self.ordinary = (used_V & ~self.special_V).nonzero().squeeze(1)

    def __call__(
        self, ids_BT: Tensor, attention_mask_BT: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Augmented ids and mask, int64, as long as the longest row that is left.

        A caption's fate depends on its own seed alone, whatever else is in the batch. At least one
        word of a row that has any is kept.
        """
        rates, real_BT = self.rates, attention_mask_BT.bool()
        draw_BT, other_BT = self._draw(real_BT, seeds)
        text_BT = real_BT & ~self.special_V[ids_BT]
        first_BT, draw_BT = self._by_word(ids_BT, text_BT, draw_BT)
        masked_BT = text_BT & (draw_BT < rates.mask)
        random_BT = text_BT & ~masked_BT & (draw_BT < rates.mask + rates.random)
        deleted_BT = text_BT & ~masked_BT & ~random_BT
        deleted_BT &= draw_BT < rates.mask + rates.random + rates.delete
        # in rows that would lose every word, the one nearest to being kept stays
        emptied_B1 = (deleted_BT == text_BT).all(1, keepdim=True)
        best_B1 = draw_BT.masked_fill(~text_BT, -1.0).argmax(1, keepdim=True)
        deleted_BT &= ~(emptied_B1 & (first_BT == first_BT.gather(1, best_B1)))
        ids_BT = torch.where(random_BT, other_BT, ids_BT)
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
        before_BT[:, 1:] = text_BT[:, :-1] & ~self.ends_V[ids_BT[:, :-1]]
        begins_BT = self.starts_V[ids_BT] | ~before_BT
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        first_BT = torch.where(begins_BT, positions_BT, 0).cummax(1).values
        return first_BT, draw_BT.gather(1, first_BT)

    def _compact(self, ids_BT: Tensor, kept_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Kept tokens to the front in their order, and no longer than the longest row."""
        order_BT = (~kept_BT).to(torch.uint8).argsort(dim=1, stable=True)
        counts_B1 = kept_BT.sum(1, keepdim=True)
        longest = int(counts_B1.max()) if len(counts_B1) else 0
        mask_BT = torch.arange(longest) < counts_B1
        ids_BT = ids_BT.gather(1, order_BT)[:, :longest].masked_fill(~mask_BT, self.pad_id)
        return ids_BT, mask_BT.long()
