"""The mask rule equals a loop that says it in words."""

import pytest
import torch

from engine import masks


def by_loop(causal, segment, valid):
    """Row by row, column by column."""
    rows, length = len(causal), len(causal[0])
    sees = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        for i in range(length):
            for j in range(length):
                earlier = sum(causal[b][: j + 1]) <= sum(causal[b][: i + 1])
                known = segment[b][j] == 0 or segment[b][j] == segment[b][i]
                both = valid[b][i] and valid[b][j]
                sees[b, i, j] = (earlier and known and both) or i == j
    return sees


def git_by_words(num_prefix, valid, image_valid=None):
    """Image sees image; text sees image and the text up to itself; padding sees itself."""
    length = num_prefix + len(valid[0])
    sees = torch.zeros(len(valid), length, length, dtype=torch.bool)
    there = image_valid or [[1] * num_prefix for _ in valid]
    for b, row in enumerate(valid):
        for i in range(length):
            for j in range(length):
                image_i, image_j = i < num_prefix, j < num_prefix
                whole = [*there[b], *row]
                real = whole[i] and whole[j]
                may = image_j if image_i else (image_j or j <= i)
                sees[b, i, j] = bool(real and may) or i == j
    return sees


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_equals_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    causal, segment, valid = (torch.randint(0, n, (3, 9), generator=generator) for n in (2, 3, 2))
    want = by_loop(causal.tolist(), segment.tolist(), valid.tolist())
    assert torch.equal(masks.visible(causal, segment, valid), want)


def test_a_prefix_is_gits_mask() -> None:
    valid = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    mask = masks.prefix(torch.ones(3, 3, dtype=torch.int64), torch.tensor(valid), torch.float64)
    assert mask.shape == (3, 1, 7, 7)
    assert mask.dtype == torch.float64
    assert torch.equal(mask[:, 0] == 0, git_by_words(3, valid))
    assert float(mask.min()) == torch.finfo(torch.float64).min


def test_images_that_are_not_there_are_seen_by_none() -> None:
    valid, image = [[1, 1, 0], [1, 1, 1], [1, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    mask = masks.prefix(torch.tensor(image), torch.tensor(valid), torch.float64)
    assert torch.equal(mask[:, 0] == 0, git_by_words(4, valid, image))


def test_labels_of_different_segments_do_not_see_each_other() -> None:
    causal = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    segment = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    sees = masks.visible(causal, segment)[0]
    assert not sees[5, 3] and not sees[6, 4]  # the second label sees nothing of the first
    assert sees[5, :3].all() and sees[6, 5]  # but the image, the prompt and itself


@pytest.mark.parametrize("seed", range(3))
def test_what_is_unseen_is_seen_by_nobody_and_the_last_queries_are_the_last_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    causal, segment, valid, unseen = (
        torch.randint(0, n, (3, 9), generator=generator) for n in (2, 3, 2, 2)
    )
    seen = masks.visible(causal, segment, valid, unseen_BT=unseen)
    want = by_loop(causal.tolist(), segment.tolist(), valid.tolist())
    hidden = unseen.bool()[:, None, :] & valid.bool()[:, :, None]  # padding sees itself still
    assert torch.equal(seen, want & ~hidden)
    whole = masks.visible(causal, segment)
    assert torch.equal(masks.visible(causal, segment, last=4), whole[:, -4:])
