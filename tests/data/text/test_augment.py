"""Text augmentation: rates, whole words, special tokens, and independence of the batch."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import schema
from engine.config.schema import TextAugment
from engine.data.text import bytes as byte_tokenizer
from engine.data.text.augment import TextAugmenter
from engine.errors import UserError

PAD, START, END, MASK = range(4)
SPECIAL = (PAD, START, END, MASK)
# ids 4…53 begin a word, 54…103 continue one
PIECES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50)),
          *(f"##p{i}" for i in range(50))]  # fmt: skip


class Words:
    """What the augmenter must know of a tokenizer."""

    vocab_size, pad_id, mask_id, special_ids = len(PIECES), PAD, MASK, frozenset(SPECIAL)
    pieces = PIECES


class Maskless(Words):
    mask_id = None


def augmenter(mask=0.0, random=0.0, delete=0.0, tokenizer=Words) -> TextAugmenter:
    return TextAugmenter(TextAugment(mask=mask, random=random, delete=delete), tokenizer())


def sentence(words: list[int], seed: int = 0) -> list[int]:
    """A caption whose words have the given numbers of pieces."""
    generator = torch.Generator().manual_seed(seed)
    ids = [START]
    for pieces in words:
        ids.append(int(torch.randint(4, 54, (), generator=generator)))
        ids += torch.randint(54, 104, (pieces - 1,), generator=generator).tolist()
    return [*ids, END]


def padded(rows: list[list[int]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows) + extra
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def tokens(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def split(row: list[int]) -> list[list[int]]:
    """Words of a caption, its start and end left out."""
    words: list[list[int]] = []
    for token in row[1:-1]:
        if token >= 54:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def test_nothing_asked_nothing_done():
    ids, mask = padded([sentence([1, 2]), sentence([3])])
    augment = augmenter()
    assert not augment.active
    out_ids, out_mask = augment(ids, mask, [1, 2])
    assert torch.equal(out_ids, ids)
    assert torch.equal(out_mask, mask)


def test_masking_all_leaves_only_the_special_tokens():
    ids, mask = padded([sentence([1, 2, 1]), sentence([3])])
    out_ids, out_mask = augmenter(mask=1.0)(ids, mask, [1, 2])
    assert tokens(out_ids, out_mask) == [[START, *[MASK] * 4, END], [START, *[MASK] * 3, END]]
    assert torch.equal(out_mask, mask)


def test_replacements_are_ordinary_ids_of_the_same_number():
    ids, mask = padded([sentence([1, 2, 1] * 20)])
    out_ids, out_mask = augmenter(random=1.0, tokenizer=Maskless)(ids, mask, [7])
    row = tokens(out_ids, out_mask)[0]
    assert (row[0], row[-1], len(row)) == (START, END, ids.shape[1])
    assert not set(row[1:-1]) & set(SPECIAL)
    assert sum(a == b for a, b in zip(row[1:-1], ids[0, 1:-1].tolist(), strict=True)) < 5


def test_replacements_are_uniform_over_the_ordinary_ids():
    ids, mask = padded([sentence([1] * 500, seed) for seed in range(40)])
    out_ids, _ = augmenter(random=1.0)(ids, mask, range(len(ids)))
    counts = torch.bincount(out_ids[:, 1:-1].flatten(), minlength=104)[4:]
    assert len(counts) == 100
    assert ((counts - 200).abs() < 6 * 200**0.5).all()


def test_deleting_all_keeps_one_whole_word():
    rows = [sentence([2, 3, 1], seed) for seed in range(30)]
    ids, mask = padded(rows)
    out_ids, out_mask = augmenter(delete=1.0)(ids, mask, range(30))
    kept = set()
    for row, out in zip(rows, tokens(out_ids, out_mask), strict=True):
        words = split(row)
        assert split(out)[0] in words
        assert len(split(out)) == 1
        kept.add(words.index(split(out)[0]))
    assert kept == {0, 1, 2}
    assert out_ids.shape[1] == int(out_mask.sum(1).max())  # trimmed to what is left


def test_a_caption_without_words_and_an_empty_batch_stay():
    empty = torch.zeros(0, 5, dtype=torch.int64)
    assert augmenter(delete=0.5)(empty, empty, [])[0].shape == (0, 0)
    ids, mask = padded([[START, END], sentence([2])])
    out_ids, out_mask = augmenter(delete=1.0)(ids, mask, [0, 1])
    assert tokens(out_ids, out_mask)[0] == [START, END]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=4),
    seed=st.integers(0, 2**62),
    extra=st.integers(0, 3),
)
def test_words_are_masked_or_deleted_whole_and_order_is_kept(words, seed, extra):
    rows = [sentence(pieces, number) for number, pieces in enumerate(words)]
    ids, mask = padded(rows, extra)
    before = ids.clone()
    out_ids, out_mask = augmenter(mask=0.3, delete=0.3)(ids, mask, range(seed, seed + len(rows)))
    assert torch.equal(ids, before)
    assert (out_ids[out_mask == 0] == PAD).all()
    for row, out in zip(rows, tokens(out_ids, out_mask), strict=True):
        assert (out[0], out[-1]) == (START, END)
        left = out[1:-1]
        assert left
        assert matches(split(row), left)


def matches(words: list[list[int]], left: list[int]) -> bool:
    """Whether ``left`` is the words in order, each whole, masked whole or missing."""
    if not words:
        return not left
    word, size = words[0], len(words[0])
    if left[:size] in (word, [MASK] * size) and matches(words[1:], left[size:]):
        return True
    return matches(words[1:], left)


def test_rates_are_met_in_word_pieces():
    ids, mask = padded([sentence([1, 2, 3, 1] * 50, seed) for seed in range(100)])
    out_ids, out_mask = augmenter(mask=0.1, random=0.02, delete=0.08)(ids, mask, range(100))
    pieces = int(mask.sum()) - 200
    assert (out_ids == MASK).sum().item() / pieces == pytest.approx(0.1, abs=0.01)
    assert 1 - (int(out_mask.sum()) - 200) / pieces == pytest.approx(0.08, abs=0.01)
    kept = augmenter(mask=0.1, random=0.02)(ids, mask, range(100))[0]
    changed = ((kept != ids) & (kept != MASK)).sum().item() / pieces
    assert changed == pytest.approx(0.02 * 0.99, abs=0.005)


def test_a_seed_decides_alone_whatever_stands_beside():
    rows = [sentence([1, 2, 3] * 3, seed) for seed in range(6)]
    augment = augmenter(mask=0.2, random=0.2, delete=0.2)
    together = tokens(*augment(*padded(rows, extra=4), range(6)))
    for number, row in enumerate(rows):
        assert tokens(*augment(*padded([row]), [number])) == [together[number]]
    backwards = tokens(*augment(*padded(rows[::-1]), list(range(6))[::-1]))
    assert backwards[::-1] == together
    assert tokens(*augment(*padded(rows), range(100, 106))) != together


def test_seeds_are_repeatable_and_no_other_randomness_is_used():
    ids, mask = padded([sentence([1, 2, 3] * 3, seed) for seed in range(6)])
    augment = augmenter(mask=0.2, random=0.2, delete=0.2)
    state = torch.get_rng_state()
    first = augment(ids, mask, range(5, 11))
    again = augment(ids, mask, range(5, 11))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert tokens(*first) != tokens(*augment(ids, mask, range(6, 12)))


def test_it_travels_to_workers():
    augment = augmenter(mask=0.5)
    ids, mask = padded([sentence([1, 2, 3])])
    copied = pickle.loads(pickle.dumps(augment))(ids, mask, [3])  # as a data loader does
    assert torch.equal(copied[0], augment(ids, mask, [3])[0])


@pytest.mark.parametrize(
    ("pieces", "begins"),
    [
        (["[CLS]", "run", "##ning", "dog", "."], [True, True, False, True, True]),
        (["<s>", "Ġrun", "ning", "Ġdog", "."], [True, True, False, True, False]),
        (["<s>", "▁run", "ning", "▁dog", "."], [True, True, False, True, False]),
        (["<s>", " run", "ning", " dog", "."], [True, True, False, True, False]),
        (["<s>", "run", "ning</w>", "dog</w>", ".</w>"], [True, True, False, True, True]),
        (["[CLS]", "r", "u", "n", "."], [True, True, True, True, True]),
    ],
)
def test_words_by_the_vocabularys_spelling(pieces, begins):
    class Spelled:
        vocab_size, pad_id, mask_id, special_ids = 5, 0, None, frozenset({0})

    Spelled.pieces = pieces
    augment = TextAugmenter(TextAugment(delete=0.5), Spelled())
    ids = torch.arange(5)[None]
    text = torch.tensor([[False, True, True, True, True]])
    first, draws = augment._by_word(ids, text, torch.arange(5.0)[None])
    found = [int(place) == i for i, place in enumerate(first[0])]
    assert found == begins
    assert torch.equal(draws.long(), first)


def test_a_bytes_word_is_what_stands_between_spaces():
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    augment = TextAugmenter(TextAugment(mask=0.5), tokenizer)
    caption = "a small dog runs along the beach"
    ids, mask = tokenizer([caption], 64)
    masked = augment(ids, mask, [4])[0][0, 1:-1] == tokenizer.mask_id
    assert len(masked) == len(caption)
    start = 0
    for word in caption.split(" "):
        with_space = masked[max(0, start - 1) : start + len(word)]  # the space begins the word
        assert with_space.all() or not with_space.any()
        start += len(word) + 1
    assert masked.any()
    assert not masked.all()


def test_every_piece_alone():
    class Unmarked(Words):
        pieces = tuple(piece.removeprefix("##") for piece in PIECES)

    augment = augmenter(mask=0.5, tokenizer=Unmarked)
    ids, mask = padded([sentence([4] * 20)])
    masked = (augment(ids, mask, [0])[0] == MASK)[0, 1:-1].view(20, 4)
    assert (masked.any(1) & ~masked.all(1)).any()


def test_mistakes_are_named_with_their_key():
    with pytest.raises(UserError, match="no mask token") as caught:
        augmenter(mask=0.1, tokenizer=Maskless)
    assert caught.value.key == "transforms.text_augment.mask"
    assert augmenter(delete=0.1, tokenizer=Maskless).active
