"""Retrieval of a dataset: right figures, what is encoded how often, bad samples, many ranks."""

import numpy as np
import pytest
import torch

from engine.config.schema import Config
from engine.errors import FaultError, UserError
from engine.evals.retrieval import RetrievalEvaluation
from engine.metrics import retrieval as metrics
from engine.run import Run
from tests import distributed
from tests.evals.colours import ColourSource, Passing, colours, png, predictor

SHUFFLED = {"shuffle_words": True}


def source(num_images=7, captions_each=3):
    """Captions near their image's colour; rows of an image lie apart from each other."""
    rows = []
    for k in range(captions_each):
        for image_id, colour in enumerate(colours(num_images)):
            caption = " ".join(str(min(255, value + 8 * k)) for value in colour)
            rows.append((png(colour), caption, image_id, None))
    return ColourSource(rows)


def evaluate(model, data, num_rows=None, **sections):
    """Figures of the first ``num_rows`` rows."""
    rows = {} if num_rows is None else {"valid_steps": num_rows, "batch_size_val": 1}
    run = Run("clip", Config.model_validate({"data": rows, **sections}), torch.device("cpu"))
    return RetrievalEvaluation(run).score(model, data)


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
    used = predictor()
    found = evaluate(used, source(60))
    assert found.metrics == pytest.approx(expected(60))
    assert 0 < found.metrics["RSUM"] < 600
    assert {kind: sum(seen) for kind, seen in used.task.seen.items()} == {"image": 60, "text": 180}
    assert found.bad == []


def test_each_image_and_each_caption_is_encoded_once():
    used = predictor()
    evaluate(used, source())
    assert used.task.seen == {"image": [4, 3], "text": [4, 4, 4, 4, 4, 1]}


def test_modes_of_the_model_are_put_back():
    model = Passing()
    evaluate(predictor(model=model), source())
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_bad_rows_and_images_are_left_out_and_named():
    full = source()
    full.rows[0] = (full.rows[0][0], "", 0, None)  # the first row of image 0 has no caption
    for row in (2, 9, 16):  # all rows of image 2 name a broken file
        full.rows[row] = (b"broken", full.rows[row][1], 2, None)
    used = predictor()
    found = evaluate(used, full)
    assert [(r.index, r.cause) for r in found.bad] == [(0, "no caption"), (2, "not an image")]
    assert sum(used.task.seen["image"]) == 6 and sum(used.task.seen["text"]) == 21 - 1 - 3
    kept = ColourSource([row for i, row in enumerate(full.rows) if i not in (0, 2, 9, 16)])
    assert found.metrics == evaluate(predictor(), kept).metrics


def test_only_the_first_rows():
    used = predictor()
    found = evaluate(used, source(), num_rows=10)
    assert sum(used.task.seen["text"]) == 10
    whole = ColourSource(source().rows[:10])
    assert found.metrics == evaluate(predictor(), whole).metrics
    evaluate(used := predictor(), source(), num_rows=1000)
    assert sum(used.task.seen["text"]) == 21


def test_shuffled_words_tell_whether_order_is_read():
    ordered, again = (
        evaluate(predictor(), source(30), eval=SHUFFLED, runner={"seed": 1}) for _ in range(2)
    )
    assert ordered.metrics == again.metrics
    plain = {name: v for name, v in ordered.metrics.items() if "shuffled" not in name}
    assert set(ordered.metrics) == set(plain) | {f"shuffled_words/{name}" for name in plain}
    assert ordered.metrics["shuffled_words/RSUM"] < plain["RSUM"] - 30
    other = evaluate(predictor(), source(30), eval=SHUFFLED, runner={"seed": 2})
    assert other.metrics["RSUM"] == plain["RSUM"]
    assert other.metrics["shuffled_words/RSUM"] != ordered.metrics["shuffled_words/RSUM"]


def test_intervals_and_examples():
    found = evaluate(predictor(), source(), eval={"bootstrap": 50})
    low, high = (found.metrics[f"RSUM_{end}"] for end in ("low", "high"))
    assert low <= found.metrics["RSUM"] <= high
    assert [example.name for example in found.examples] == [str(image) for image in range(7)]
    for example in found.examples:
        assert len(example.found) == 3
        scores = [score for _, score in example.found]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] <= 1.0001


def test_nothing_usable_is_the_users_to_mend():
    broken = ColourSource([(b"broken", "1 2 3", i, None) for i in range(3)])
    with pytest.raises(UserError, match=r"'colours' \(valid\) has no image.*3 not an image"):
        evaluate(predictor(), broken)
    with pytest.raises(UserError, match="it has no rows"):
        evaluate(predictor(), ColourSource([]))


def test_features_that_are_not_finite_are_a_fault():
    class Broken(Passing):
        def forward(self, x):
            return x * torch.nan

    with pytest.raises(FaultError, match=r"'colours'.*7 of 7 image features are NaN"):
        evaluate(predictor(model=Broken()), source())


def evaluated(num_images, captions_each, broken):
    torch.manual_seed(0)
    data = source(num_images, captions_each)
    for row in broken:
        data.rows[row] = (b"broken", data.rows[row][1], data.rows[row][2], None)
    found = evaluate(predictor(batch_size=6), data, eval={**SHUFFLED, "bootstrap": 10})
    bad = [record.index for record in found.bad]
    return found.metrics, bad, [(one.name, one.captions, one.found) for one in found.examples]


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
