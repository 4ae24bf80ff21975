"""Retrieval of a dataset: right figures, what is encoded how often, bad samples, many ranks."""

import numpy as np
import pytest
import torch

from engine.errors import FaultError, UserError
from engine.evals import retrieval
from engine.metrics import retrieval as metrics
from tests import distributed
from tests.evals.colours import ColourSource, Passing, colours, png, predictor


def source(num_images=7, captions_each=3):
    """Captions near their image's colour; rows of an image lie apart from each other."""
    rows = []
    for k in range(captions_each):
        for image_id, colour in enumerate(colours(num_images)):
            caption = " ".join(str(min(255, value + 8 * k)) for value in colour)
            rows.append((png(colour), caption, image_id, None))
    return ColourSource(rows)


def expected(num_images):
    rows = source(num_images).rows
    image = torch.tensor(colours(num_images)).float() + 1e-3
    caption = torch.tensor([[float(word) for word in row[1].split()] for row in rows]) + 1e-3
    owner = torch.tensor([row[2] for row in rows])
    unit = torch.nn.functional.normalize
    features = (unit(image, dim=1), unit(caption, dim=1), owner)
    return metrics.from_ranks(
        metrics.image_to_text_ranks(*features), metrics.text_to_image_ranks(*features)
    )


def test_figures_of_a_dataset():
    found = retrieval.evaluate(predictor(), source(60))
    assert found.metrics == pytest.approx(expected(60))
    assert 0 < found.metrics["RSUM"] < 600
    assert (found.num_images, found.num_captions, found.num_seen) == (60, 180, 180)
    assert found.bad == []


def test_each_image_and_each_caption_is_encoded_once():
    used = predictor()
    retrieval.evaluate(used, source())
    assert used.task.seen == {"image": [4, 3], "text": [4, 4, 4, 4, 4, 1]}


def test_modes_of_the_model_are_put_back():
    model = Passing()
    retrieval.evaluate(predictor(model=model), source())
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_bad_rows_and_images_are_left_out_and_named():
    full = source()
    full.rows[0] = (full.rows[0][0], "", 0, None)  # the first row of image 0 has no caption
    for row in (2, 9, 16):  # all rows of image 2 name a broken file
        full.rows[row] = (b"broken", full.rows[row][1], 2, None)
    found = retrieval.evaluate(predictor(), full)
    assert [(r.index, r.cause) for r in found.bad] == [(0, "no caption"), (2, "not an image")]
    assert (found.num_images, found.num_captions) == (6, 21 - 1 - 3)
    kept = ColourSource([row for i, row in enumerate(full.rows) if i not in (0, 2, 9, 16)])
    assert found.metrics == retrieval.evaluate(predictor(), kept).metrics


def test_only_the_first_rows():
    found = retrieval.evaluate(predictor(), source(), num_rows=10)
    assert found.num_seen == found.num_captions == 10
    whole = ColourSource(source().rows[:10])
    assert found.metrics == retrieval.evaluate(predictor(), whole).metrics
    assert retrieval.evaluate(predictor(), source(), num_rows=1000).num_seen == 21


def test_shuffled_words_tell_whether_order_is_read():
    ordered, again = (
        retrieval.evaluate(predictor(), source(30), shuffle_words=True, seed=1) for _ in range(2)
    )
    assert ordered.metrics == again.metrics
    plain = {name: v for name, v in ordered.metrics.items() if "shuffled" not in name}
    assert set(ordered.metrics) == set(plain) | {f"shuffled_words/{name}" for name in plain}
    assert ordered.metrics["shuffled_words/RSUM"] < plain["RSUM"] - 30
    other = retrieval.evaluate(predictor(), source(30), shuffle_words=True, seed=2)
    assert other.metrics["RSUM"] == plain["RSUM"]
    assert other.metrics["shuffled_words/RSUM"] != ordered.metrics["shuffled_words/RSUM"]


def test_intervals_and_examples():
    found = retrieval.evaluate(predictor(), source(), bootstrap_draws=50, num_examples=2)
    low, high = found.intervals["RSUM"]
    assert low <= found.metrics["RSUM"] <= high
    assert [row for row, _ in found.examples] == [0, 1]
    for _, ranked in found.examples:
        assert len(ranked) == 3
        scores = [score for _, score in ranked]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] <= 1.0001


def test_nothing_usable_is_the_users_to_mend():
    broken = ColourSource([(b"broken", "1 2 3", i, None) for i in range(3)])
    with pytest.raises(UserError, match=r"'colours' \(valid\) has no image.*3 not an image"):
        retrieval.evaluate(predictor(), broken)
    with pytest.raises(UserError, match="it has no rows"):
        retrieval.evaluate(predictor(), ColourSource([]))


def test_features_that_are_not_finite_are_a_fault():
    class Broken(Passing):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(FaultError, match=r"'colours'.*7 of 7 image features are NaN"):
        retrieval.evaluate(predictor(model=Broken()), source())


def evaluated(num_images, captions_each, broken):
    torch.manual_seed(0)
    data = source(num_images, captions_each)
    for row in broken:
        data.rows[row] = (b"broken", data.rows[row][1], data.rows[row][2], None)
    found = retrieval.evaluate(
        predictor(batch_size=6), data, shuffle_words=True, num_examples=2, bootstrap_draws=10
    )
    bad = [record.index for record in found.bad]
    return found.metrics, found.num_images, found.num_captions, bad, found.examples, found.intervals


@pytest.mark.parametrize(
    ("num_images", "captions_each", "broken"),
    [(7, 3, ()), (7, 2, (0, 1, 7, 8)), (2, 1, ())],  # the last: a rank without an image
)
def test_the_same_on_any_number_of_ranks(num_images, captions_each, broken):
    alone = evaluated(num_images, captions_each, broken)
    for result in distributed.run(evaluated, 3, num_images, captions_each, broken):
        assert result == alone


def test_order_of_texts_is_kept_whatever_their_length():
    texts = ["9", "1 2 3", "4 5", "7 7 7"]
    features = predictor(batch_size=2).texts(texts)
    for text, feature in zip(texts, features, strict=True):
        alone = predictor().texts([text])[0]
        np.testing.assert_allclose(feature.numpy(), alone.numpy(), rtol=1e-6)
