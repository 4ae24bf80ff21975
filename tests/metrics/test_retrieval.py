"""Retrieval figures against a full ranking, hand-computed cases, and their invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.metrics import retrieval


def figures(*features):
    ways = (retrieval.image_to_text_ranks, retrieval.text_to_image_ranks)
    return retrieval.from_ranks(*(ranks(*features) for ranks in ways))


def brute_force(image, caption, owner):
    """Every query's gallery sorted in plain Python: (image→text ranks, text→image ranks)."""
    scores = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in caption] for x in image]

    def best_rank(row, right):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j in right))
        return next((1 + before for before, j in enumerate(order) if j in right), 0)

    image_ranks = [
        best_rank(scores[i], {c for c in range(len(caption)) if owner[c] == i})
        for i in range(len(image))
    ]
    caption_ranks = [
        best_rank([scores[i][c] for i in range(len(image))], {owner[c]})
        for c in range(len(caption))
    ]
    return image_ranks, caption_ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 15), st.integers(1, 20))
def test_equals_a_full_ranking_ties_included(seed, num_images, more_captions, chunk_size):
    generator = np.random.default_rng(seed)
    owner = np.concatenate([
        np.arange(num_images), generator.integers(0, num_images, more_captions)
    ])  # fmt: skip
    # Small whole numbers: scores are exact and often equal.
    image = generator.integers(-1, 2, (num_images, 3))
    caption = generator.integers(-1, 2, (len(owner), 3))
    expected = brute_force(image.tolist(), caption.tolist(), owner.tolist())
    features = (torch.tensor(image).float(), torch.tensor(caption).float(), torch.tensor(owner))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
        image_ranks = retrieval.image_to_text_ranks(*features)
        caption_ranks = retrieval.text_to_image_ranks(*features)
    assert (image_ranks.tolist(), caption_ranks.tolist()) == expected


def test_several_captions_of_an_image_by_hand():
    # Angles in degrees; image 0 at 0, image 1 at 90. Captions of 0: at 80 and 100; of 1: 89 and 30.
    def at(*degrees):
        radians = torch.tensor(degrees).double() * math.pi / 180
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    image, caption = at(0, 90), at(80, 100, 89, 30)
    owner = torch.tensor([0, 0, 1, 1])
    values = figures(image, caption, owner)
    # Image 0 ranks 30 (wrong), 80 (right): rank 2. Image 1 ranks 89 (right): rank 1.
    assert values["image_to_text_R@1"] == 50.0
    assert values["image_to_text_median_rank"] == 1.5
    # Captions 80 and 100 are nearer to image 1: rank 2. 89 is right; 30 is nearer to image 0.
    assert values["text_to_image_R@1"] == 25.0
    assert values["text_to_image_median_rank"] == 2.0
    assert values["mean_R@1"] == 37.5
    assert values["RSUM"] == 50 + 25 + 4 * 100  # k greater than either gallery: all are hits


def test_names_and_their_order():
    values = figures(torch.eye(2), torch.eye(2), torch.arange(2))
    assert list(values) == [
        "image_to_text_R@1", "image_to_text_R@5", "image_to_text_R@10",
        "text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10",
        "RSUM", "mean_R@1", "image_to_text_median_rank", "text_to_image_median_rank",
    ]  # fmt: skip
    assert values["RSUM"] == 600.0


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1000])
def test_chunk_size_changes_nothing(chunk_size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(130, 96, generator=generator), dim=1)
    owner = torch.arange(130).repeat_interleave(5)
    caption = torch.nn.functional.normalize(
        image[owner] + torch.randn(650, 96, generator=generator), dim=1
    )
    image[7] = image[11]  # tied images stay tied however the products are cut
    whole = (
        retrieval.image_to_text_ranks(image, caption, owner),
        retrieval.text_to_image_ranks(image, caption, owner),
    )
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk_size)
    cut = (
        retrieval.image_to_text_ranks(image, caption, owner),
        retrieval.text_to_image_ranks(image, caption, owner),
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert (whole[1][owner == 7] >= 2).all()


def test_slices_join_to_the_whole():
    generator = torch.Generator().manual_seed(1)
    features = (
        torch.randn(17, 8, generator=generator),
        torch.randn(40, 8, generator=generator),
        torch.randint(0, 17, (40,), generator=generator),
    )
    whole = retrieval.image_to_text_ranks(*features)
    parts = [
        retrieval.image_to_text_ranks(*features, range(a, b)) for a, b in ((0, 6), (6, 6), (6, 17))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_collapsed_features_score_nothing():
    point = torch.ones(20, 4)
    values = figures(point, point, torch.arange(20))
    assert values["RSUM"] == 0.0
    assert values["image_to_text_median_rank"] == 20.0


def test_an_image_without_a_caption_is_a_distractor_and_no_query():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    caption = torch.tensor([[0.95, 0.05], [0.0, 1.0]])
    owner = torch.tensor([0, 1])
    ranks = retrieval.image_to_text_ranks(image, caption, owner)
    assert ranks.tolist() == [1, 1, 0]
    assert retrieval.from_ranks(ranks, torch.tensor([1, 1]))["image_to_text_R@1"] == 100.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, c, o: (i.index_fill(0, torch.tensor(2), torch.nan), c, o),
            r"1 of 4 image.*row 2",
        ),
        (lambda i, c, o: (i, c.index_fill(0, torch.tensor(1), torch.inf), o), "caption.*row 1"),
        (lambda i, c, o: (i, c[:, :3], o), "4 wide, caption features 3"),
        (lambda i, c, o: (i, c, o + 1), "caption 3 belongs to image 4 of 4"),
        (lambda i, c, o: (i, c, o[:2]), "4 captions, but 2 image rows"),
        (lambda i, c, o: (i[0], c, o), r"image features must be \[N, D\]"),
    ],
)
def test_faults_are_named(change, message):
    features = change(torch.eye(4), torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match=message):
        figures(*features)


def test_nothing_to_rank_is_an_error():
    none = torch.empty(0, 4)
    with pytest.raises(ValueError, match="at least one"):
        figures(none, none, torch.empty(0, dtype=torch.int64))


def test_memory_does_not_hold_the_full_matrix(monkeypatch):
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        out = product(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    features = torch.nn.functional.normalize(torch.randn(600, 8), dim=1)
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", 32)
    figures(features, features, torch.arange(600))
    assert largest == 32 * 600


def test_bootstrap_covers_the_figure_and_narrows_with_more_images():
    def interval(num_images):
        generator = torch.Generator().manual_seed(3)
        owner = torch.arange(num_images).repeat_interleave(5)
        image = (torch.rand(num_images, generator=generator) < 0.4).long() * -10 + 11
        text = (torch.rand(5 * num_images, generator=generator) < 0.3).long() * -10 + 11
        point = retrieval.from_ranks(image, text)
        bounds = retrieval.bootstrap(image, text, owner, num_draws=300)
        assert bounds.keys() == {name for name in point if "median" not in name}
        for name, (low, high) in bounds.items():
            assert low <= point[name] <= high
        # A share p of n independent images has a standard error of sqrt(p (1 - p) / n).
        low, high = bounds["image_to_text_R@1"]
        p = point["image_to_text_R@1"] / 100
        expected = 2 * 1.96 * 100 * math.sqrt(p * (1 - p) / num_images)
        assert (high - low) == pytest.approx(expected, rel=0.25)
        return high - low

    assert interval(400) < interval(50)


def test_bootstrap_draws_the_captions_of_an_image_together():
    # Ten images; all captions of an image are hits or all are misses: the interval must be that of
    # ten independent draws, not of a thousand.
    owner = torch.arange(10).repeat_interleave(100)
    text = torch.where(owner < 5, 1, 100)
    bounds = retrieval.bootstrap(torch.ones(10, dtype=torch.int64), text, owner, num_draws=1000)
    low, high = bounds["text_to_image_R@1"]
    assert low <= 25
    assert high >= 75


def test_top_captions():
    scores, rows = retrieval.top_captions(torch.eye(2), torch.tensor([[0.5, 1], [1, 0.0]]), k=5)
    assert rows.tolist() == [[1, 0], [0, 1]]
    assert scores.tolist() == [[1.0, 0.5], [1.0, 0.0]]


def test_batch_recall_is_that_of_the_diagonal():
    generator = torch.Generator().manual_seed(5)
    text = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    image = text + 0.4 * torch.randn(40, 8, generator=generator)
    expected = figures(image, text, torch.arange(40))["image_to_text_R@1"]
    assert 0 < expected < 100
    assert retrieval.batch_recall(image, text).item() == pytest.approx(expected)
    first = retrieval.image_to_text_ranks(image, text, torch.arange(40), range(10))
    expected = 100 * (first <= 1).double().mean().item()
    assert retrieval.batch_recall(image, text, num_queries=10).item() == pytest.approx(expected)
    assert retrieval.batch_recall(torch.ones(4, 2), torch.ones(4, 2)).item() == 0.0
