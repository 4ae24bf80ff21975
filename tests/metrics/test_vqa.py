"""VQA accuracy against known values, its rules by hand, and files with every mistake."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.metrics import vqa
from engine.metrics.vqa import Question, normalise

NAMES = ("questions", "annotations", "results")


@pytest.fixture
def known(shared_data):
    folder = shared_data / "vqa_text"
    ends = ("vqa_questions", "vqa_annotations", "fake_results")
    return {n: folder / f"coco_with_images_{e}.json" for n, e in zip(NAMES, ends, strict=True)}


def command(paths, *more):
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))] + list(more)


def test_known_values(known, shared_data, capsys):
    expected = shared_data / "vqa_text" / "coco_with_images_expected.json"
    wanted = json.loads(expected.read_text(encoding="utf8"))
    assert vqa.main(command(known, "--per-question")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overall"] == 62.18
    assert {name: told[name] for name in wanted["accuracy"]} == wanted["accuracy"]
    assert told["evalQA"] == wanted["evalQA"]
    assert (told["questions"], told["unanswered"], told["unknown_results"]) == (570, 0, 0)


def test_packed_files_and_lines_read_the_same(known, tmp_path):
    packed = {name: tmp_path / f"{name}.json.gz" for name in NAMES}
    for name, path in packed.items():
        path.write_bytes(gzip.compress(known[name].read_bytes()))
    rows = json.loads(known["results"].read_text(encoding="utf8"))
    lines = tmp_path / "results.jsonl"
    texts = [json.dumps({**r, "question_id": str(r["question_id"])}) for r in rows]
    lines.write_text("\n".join(texts), encoding="utf8")
    plain = vqa.read(known["annotations"], known["results"])
    assert vqa.read(packed["annotations"], packed["results"]) == plain
    assert vqa.read(packed["annotations"], lines) == plain


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("The Dog", "dog"),
        ("a an THE", ""),
        ("two dogs, none", "2 dogs 0"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("cat-dog - bird", "catdog bird"),  # a mark beside a space goes everywhere
        ("1,000 t-shirt", "1000 tshirt"),  # and so do all where a comma stands in a number
        ("a,b", "b"),  # a comma within a word leaves a space, and "a" is an article
        ("3.5", "3.5"),
        ("st. 3.", "st 3"),
        (".5", ".5"),
        ("." * 40, "." * 8),  # 32 full stops go
        ("8:00 p.m.", "8:00 pm"),
        ("dont", "don't"),
        ("couldntve couldnt've", "couldntve couldn't've"),
        ("Ive Im", "ive im"),
        ("somebody'd ow's'at lets", "somebodyd 'ow's'at lets"),
        ("É\u00a0x", "é x"),
        ("what?!", "what"),
    ],
)
def test_normalisation(answer, wanted):
    assert normalise(answer) == wanted


@pytest.mark.parametrize(
    ("answer", "answers", "wanted"),
    [
        ("yes", ["yes"] * 10, 1),
        ("Yes", ["yes"] * 10, 0),  # where all agree nothing is normalised
        (" yes\n", ["yes"] * 10, 1),
        ("Yes.", ["yes"] * 9 + ["no"], 1),
        ("a", ["a"] * 3 + ["b"] * 7, (3 * 2 / 3 + 7) / 10),
        ("b", ["c"] * 9 + ["b"], 9 * (1 / 3) / 10),
        ("two", ["2", "2 ", "\t2", "2"], 0),  # they agree once tabs and spaces are gone
        ("two", ["2", "two", "2", "two!"], 1),
        ("x", ["x", "y"], 1 / 6),
        ("x", ["x"], 0),
        ("", ["the", "", "an", "?"], 1),
    ],
)
def test_accuracy_by_hand(answer, answers, wanted):
    assert vqa.vqa_accuracy(answer, answers) == pytest.approx(wanted, abs=1e-12)


def test_all_figures_by_hand():
    questions = {
        "1": Question(("yes",) * 10, "yes/no", "is", "yes"),
        "2": Question(("no",) * 10, "yes/no", "is"),
        "3": Question(("red",) * 9 + ("Red.",), "other", "what"),
        "4": Question(("2",) * 10),
    }
    found = vqa.score(questions, {"1": "Yes.", "2": "no", "3": "The red", "9": "x"})
    assert (found.overall, found.exact_match) == (50, 75)
    assert found.per_answer_type == {"yes/no": 50, "other": 100, "number": 0}
    assert found.per_question_type == {"is": 50, "what": 100}
    assert found.gqa == {"accuracy": 50, "binary": 100, "open": 0}
    assert found.yes_no["f1"] == found.yes_no["accuracy"] == 100
    assert found.majority == {"answer": "yes", "overall": 25, "overall_by_question_type": 75}
    assert found.per_question == {"1": 0, "2": 100, "3": 100, "4": 0}


ANNOTATION = {
    "question_id": 1,
    "answers": [{"answer": "a"}],
    "answer_type": "other",
    "question_type": "what",
}
RESULT = {"question_id": 1, "answer": "a"}


def files(tmp_path, annotations, results, questions=None):
    whole = {"annotations": {"annotations": annotations}, "results": results}
    if questions is not None:
        whole["questions"] = {"questions": questions}
    paths = {name: tmp_path / f"{name}.json" for name in whole}
    for name, path in paths.items():
        content = whole[name]
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf8")
    return paths


def test_what_does_not_match_is_counted_and_told(tmp_path, capsys):
    more = [ANNOTATION, {**ANNOTATION, "question_id": 2}, {**ANNOTATION, "question_id": 3}]
    results = [RESULT, {**RESULT, "question_id": "1"}, {**RESULT, "question_id": 7}]
    paths = files(tmp_path, more, results, [{"question_id": 1}, {"question_id": 2}])
    assert vqa.main(command(paths)) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["unanswered"], told["unknown_results"], told["unasked"]) == (2, 1, 1)
    assert told["exact_match"] == 33.33
    assert err.count("warning:") == 3


@pytest.mark.parametrize(
    ("annotations", "results", "message"),
    [
        ([ANNOTATION], "{", "results.json is not JSON"),
        ([ANNOTATION], {}, "results.json holds an object; a list"),
        ([ANNOTATION], [], "results.json holds no results"),
        ([ANNOTATION], [3], "entry 0 is a number"),
        ([ANNOTATION], [{"answer": "a"}], "entry 0: there is no question_id"),
        ([ANNOTATION], [{"question_id": 1}], "question 1.*there is no answer"),
        ([ANNOTATION], [{**RESULT, "answer": 3}], "the answer is a number"),
        (
            [ANNOTATION],
            [RESULT, {**RESULT, "answer": "b"}],
            r"entry 1 \(question 1\) is answered again",
        ),
        ([ANNOTATION], [{**RESULT, "question_id": 2}], "answers none of the questions"),
        ([ANNOTATION, ANNOTATION], [RESULT], "annotation 1 .question 1. repeats"),
        ([{**ANNOTATION, "answers": []}], [RESULT], "question 1.: answers is an empty list"),
        ([{**ANNOTATION, "answers": ["a"]}], [RESULT], "answer 0 is a text"),
        ([{**ANNOTATION, "answers": [{}]}], [RESULT], "answer 0: there is no answer"),
        ([{"question_id": 1, "answers": [RESULT]}], [RESULT], "there is no answer_type"),
        ([{**ANNOTATION, "question_type": None}], [RESULT], "question_type is null"),
        ([], [RESULT], "annotations.json holds no annotations"),
    ],
)
def test_files_that_are_wrong(tmp_path, annotations, results, message):
    paths = files(tmp_path, annotations, results)
    with pytest.raises(UserError, match=message):
        vqa.read(paths["annotations"], paths["results"])


def test_other_files_that_are_wrong(tmp_path):
    paths = files(tmp_path, [ANNOTATION], [RESULT], [{"question_id": 5}])
    with pytest.raises(UserError, match="annotates none of the questions"):
        vqa.read(**paths)
    with pytest.raises(UserError, match='has no "annotations"'):
        vqa.read(paths["questions"], paths["results"])
    with pytest.raises(UserError, match="it holds a list"):
        vqa.read(paths["results"], paths["results"])
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(gzip.compress(b"[]" * 100)[:-9])
    with pytest.raises(UserError, match="cannot be unpacked"):
        vqa.read(broken, broken)


def test_a_mistake_ends_the_command_with_one_message_and_2(tmp_path):
    paths = files(tmp_path, [ANNOTATION], "[")
    done = subprocess.run(
        [sys.executable, "-m", "engine.metrics.vqa", *command(paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{paths['results']} is not JSON")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
