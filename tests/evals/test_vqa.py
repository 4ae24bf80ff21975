"""Answers to a source's questions: right figures, choice by likelihood, text alone, many ranks."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.schema import Config, Generate
from engine.data.transforms import pipeline
from engine.errors import FaultError, UserError
from engine.evals import vqa
from engine.evals.predict import Predictor
from engine.generate.likelihood import log_likelihoods
from engine.metrics.vqa import vqa_accuracy
from engine.run import Run
from engine.types import BadSample, Row
from tests import distributed
from tests.evals import answering

COLOURS = ["dd", "df", "de", "ff", "bb"]  # between which a random model hesitates


def png(seed):
    pixels = (255 * answering.noise(1, seed=seed)[0]).byte().permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


class Asked:
    """Questions in memory: every third without an image, every fifth with two turns before it."""

    name, split = "asked", "valid"

    def __init__(self, count=11, bad=(), num_answers=10):
        self.rows = []
        for i in range(count):
            said = tuple(COLOURS[(i + (n > 6)) % 3] for n in range(num_answers))
            turns = (("human", f"What colour is {i}?"), ("gpt", said[0] if said else ""))
            before = (("human", "Is it there?"), ("gpt", "yes")) if i % 5 == 0 else ()
            self.rows.append(
                Row(
                    f"row {i}", () if i % 3 == 2 else (png(i),), "", f"i{i}", f"q{i}",
                    turns=before + (turns if said else turns[:1]), answers=said,
                    question_type="colour" if i % 2 else "hue/shade",
                )
            )  # fmt: skip
        self.bad = bad

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("malformed", "so it is")
        return self.rows[index]


def predictor(decoder="t5"):
    task, model = answering.make(decoder)
    with torch.no_grad():
        model.connector.weight.mul_(20)  # else a random model says the same of all images
    transforms = task.config.transforms
    transform = pipeline.build(["resize"], transforms, "transforms.valid_transforms")
    return Predictor(task, model.train(), transform, torch.device("cpu"), num_workers=0)


def section(**options):
    return Generate(max_new_tokens=4, batch_size=4, **options)


def evaluation(generate, num_rows=None):
    """Of the first ``num_rows`` rows."""
    rows = {} if num_rows is None else {"valid_steps": num_rows, "batch_size_val": 1}
    config = Config.model_validate({"data": rows, "generate": generate.model_dump()})
    return vqa.build(Run("vqa", config, torch.device("cpu")))


def evaluate(used, source, generate, num_rows=None):
    return evaluation(generate, num_rows).score(used, source)


def answer(used, source, rows, generate):
    return evaluation(generate).predict(used, source, rows)


@pytest.mark.parametrize("decoder", ["t5", "causal"])
def test_the_likeliest_answer_is_chosen_row_by_row(decoder):
    used, source = predictor(decoder), Asked()
    found = evaluate(used, source, section(answers=COLOURS))
    assert [p.record.caption_id for p in found.predictions] == [f"q{i}" for i in range(11)]
    model, task = used.model.eval(), used.task
    for row, prediction in enumerate(found.predictions):
        if row % 5 == 0:
            continue  # of several turns
        record = source[row]
        tokens = torch.empty(0, 4, model.decoder.width, dtype=torch.float64)
        if record.images:
            pixels = np.array(Image.open(io.BytesIO(record.images[0])))
            tokens = model.image_tokens(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        with torch.no_grad():
            likely = log_likelihoods(
                task, model, tokens, [f"What colour is {row}?"], [COLOURS], num_images=[len(tokens)]
            )
        share = likely.log_p_R.softmax(0)
        assert prediction.answer == COLOURS[int(share.argmax())]
        assert prediction.probability == pytest.approx(float(share.max()), rel=1e-9)
    assert len({p.answer for p in found.predictions}) > 1


def test_figures_are_those_of_the_metric():
    found = evaluate(predictor(), Asked(), section(answers=COLOURS))
    scores = [100 * vqa_accuracy(p.answer, p.references) for p in found.predictions]
    told = found.metrics
    assert told["accuracy"] == pytest.approx(np.mean(scores), abs=0.005)
    assert told["question:colour"] == pytest.approx(np.mean(scores[1::2]), abs=0.005)
    assert told["question:hue_shade"] == pytest.approx(np.mean(scores[::2]), abs=0.005)
    assert told["answer:other"] == told["accuracy"]
    assert told["accuracy_is"] == "VQA v2"
    majority = [100 * vqa_accuracy("dd", p.references) for p in found.predictions]
    assert told["majority_answer"] == "dd"
    assert told["majority_accuracy"] == pytest.approx(np.mean(majority), abs=0.005)
    assert not [name for name in told if "yes_no" in name]


def test_kinds_of_answers_are_the_annotated_ones_where_there_are_any():
    source = Asked()
    source.rows[:5] = [replace(row, answer_type="yes/no") for row in source.rows[:5]]
    found = evaluate(predictor(), source, section(answers=COLOURS))
    scores = [100 * vqa_accuracy(p.answer, p.references) for p in found.predictions]
    told = {name: value for name, value in found.metrics.items() if name.startswith("answer:")}
    assert list(told) == ["answer:other", "answer:yes_no"]
    assert told["answer:yes_no"] == pytest.approx(np.mean(scores[:5]), abs=0.005)
    assert told["answer:other"] == pytest.approx(np.mean(scores[5:]), abs=0.005)
    assert found.predictions[0].to_json()["answer_type"] == "yes/no"
    assert "answer_type" not in found.predictions[5].to_json()


def test_single_answers_are_matched_exactly():
    found = evaluate(predictor(), Asked(num_answers=1), section(answers=COLOURS))
    right = [p.answer == p.references[0] for p in found.predictions]
    assert found.metrics["accuracy"] == pytest.approx(100 * np.mean(right), abs=0.005)
    assert found.metrics["accuracy_is"] == "exact match"
    assert 0 < sum(right) < len(right)


def test_answers_are_generated_and_do_not_hang_on_the_batch():
    used, source = predictor(), Asked()
    before = torch.get_rng_state()
    whole, _ = answer(used, source, np.arange(11), section())
    assert used.model.training
    assert torch.equal(torch.get_rng_state(), before)
    alone = [answer(used, source, np.array([row]), section())[0][0] for row in range(11)]
    assert whole == alone
    assert all(p.probability is None and p.answer == p.answer for p in whole)
    assert len({p.answer for p in whole}) > 2
    drawn, _ = answer(used, source, np.arange(11), section(method="sample", seed=1))
    again, _ = answer(used, source, np.arange(11), section(method="sample", seed=1))
    assert drawn == again != whole


def test_bad_rows_are_left_out_and_named():
    source = Asked(bad=(1, 4))
    source.rows[6] = replace(source.rows[6], images=(b"broken",))
    source.rows[7] = replace(source.rows[7], turns=(("human", "<image> <image> <image>?"),))
    found = evaluate(predictor(), source, section(answers=COLOURS), num_rows=9)
    assert [p.row for p in found.predictions] == [0, 2, 3, 5, 8]
    told = {(r.index, r.cause) for r in found.bad}
    assert told == {
        (1, "malformed"), (4, "malformed"), (6, "not an image"), (7, "image count")
    }  # fmt: skip
    with pytest.raises(FaultError, match=r"none of the 3 questions is usable.*malformed"):
        evaluate(predictor(), Asked(3, bad=(0, 1, 2)), section())
    with pytest.raises(FaultError, match="none of them has an answer"):
        evaluate(predictor(), Asked(3, num_answers=0), section(answers=COLOURS))


def test_an_answer_that_has_no_room():
    with pytest.raises(UserError, match=r"takes 381 tokens.* raise") as raised:
        evaluate(predictor("causal"), Asked(), section(answers=["x" * 380, "y"]))
    assert raised.value.key == "generate.answers"


def on_a_rank():
    found = evaluate(predictor(), Asked(bad=(9,)), section(answers=COLOURS))
    return found.metrics, [p.to_json() for p in found.predictions], len(found.bad)


def test_two_ranks_find_the_same_as_one():
    one = on_a_rank()
    first, second = distributed.run(on_a_rank, 2)
    assert first == second
    assert first[0] == one[0]
    assert first[2] == one[2] == 1
    for mine, theirs in zip(first[1], one[1], strict=True):
        assert mine == theirs | {"probability": pytest.approx(theirs["probability"], rel=1e-9)}


def test_an_example_to_look_at():
    source = Asked()
    (found, *_), _ = answer(predictor(), source, np.arange(1), section(answers=COLOURS))
    shown = vqa.VqaEvaluation(answering.run()).example(source, found)
    assert shown.captions == ["dd", "df"]
    assert shown.found == [(found.answer, found.probability)]
    assert shown.name == "What colour is 0? · i0"
    assert shown.image.size == (16, 16)
    line = found.to_json()
    assert (line["question_id"], line["answer"]) == ("q0", found.answer)
    assert line["answers"] == ["dd"] * 7 + ["df"] * 3


def test_lists_of_allowed_answers(tmp_path):
    (tmp_path / "lines.txt").write_text("yes\nno\n", encoding="utf8")
    (tmp_path / "list.json").write_text('["yes", "no"]', encoding="utf8")
    for given in (["yes", "no"], str(tmp_path / "lines.txt"), str(tmp_path / "list.json")):
        assert vqa.choices(section(answers=given)) == ["yes", "no"]
    assert vqa.choices(section()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": []}, "is empty"),
        ({"answers": ["a", "b", "a"]}, "has 'a' twice"),
        ({"answers": ["a", " "]}, "has an empty one"),
        ({"answers": "/no/such"}, "/no/such does not exist"),
        ({"answers": "bad.json"}, "cannot be read: bad.json is not JSON"),
        ({"answers": "object.json"}, "not a JSON list of texts"),
        ({"method": "best_of_n"}, "chooses captions"),
    ],
)
def test_lists_that_are_wrong(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[", encoding="utf8")
    (tmp_path / "object.json").write_text("[1]", encoding="utf8")
    with pytest.raises(UserError, match=message) as raised:
        vqa.choices(section(**options))
    assert raised.value.key in ("generate.answers", "generate.method")
