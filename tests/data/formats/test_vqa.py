"""Questions and answers in VQA v2's form."""

import gzip
import json

import pytest

from engine.errors import UserError
from tests.data.formats.folders import folder, image, opened, put, rows

_OPTIONS = {
    "train_questions": "q.json", "train_annotations": "a.json", "train_images": "images",
    "train_image_name": "%012d.jpg",
}  # fmt: skip


def _question(number, image_id=42, text="What is it?", **more):
    return {"question_id": number, "image_id": image_id, "question": text, **more}


def _annotation(number, *answers):
    given = [
        {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers)
    ]
    return {"question_id": number, "answers": given, "multiple_choice_answer": "x"}


def _set(root, questions, annotations):
    folder(root, "images/000000000042.jpg")
    put(root / "q.json", {"task_type": "Open-Ended", "questions": questions})
    put(root / "a.json", {"annotations": annotations, "license": {}})
    return root


def test_rows(tmp_path):
    _set(
        tmp_path,
        [_question(420), _question(421, text="And this?")],
        [_annotation(421, "yes"), _annotation(420, "a dog", "a cat", "a cat")],
    )
    first, second = rows(opened("vqa", tmp_path, **_OPTIONS))
    assert first.turns == (("human", "What is it?"), ("gpt", "a cat"))
    assert first.answers == ("a dog", "a cat", "a cat")
    assert first.caption == "What is it? a cat"
    assert (first.image_id, first.caption_id) == ("42", "420")
    assert image(first) == tmp_path / "images" / "000000000042.jpg"
    assert second.caption == "And this? yes"


def test_question_types(tmp_path):
    kind = {"question_type": "what is", "answer_type": "other"}
    other = {**_annotation(2, "yes"), "answer_type": 5}
    _set(
        tmp_path,
        [
            _question(1),
            _question(2),
            _question(3, question_type="own", answer_type="mine"),
            _question(4),
        ],
        [{**_annotation(1, "a dog"), **kind}, other, _annotation(3, "b"), _annotation(4, "c")],
    )
    found = rows(opened("vqa", tmp_path, **_OPTIONS))
    assert found[1] == "malformed"
    assert [(found[n].question_type, found[n].answer_type) for n in (0, 2, 3)] == [
        ("what is", "other"), ("own", "mine"), ("", "")
    ]  # fmt: skip


def test_packed_files_and_coco_names(tmp_path):
    """``.json.gz`` is found under the plain name, images under COCO's."""
    _set(tmp_path, [_question(1)], [_annotation(1, "no")])
    for name in ("q.json", "a.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    folder(tmp_path, "images/COCO_val2014_000000000042.jpg")
    options = {key.replace("train", "valid"): value for key, value in _OPTIONS.items()}
    del options["valid_image_name"]
    (record,) = rows(opened("vqa", tmp_path, "valid", **options))
    assert image(record) == tmp_path / "images" / "COCO_val2014_000000000042.jpg"
    assert image(record).is_file()


def test_questions_without_answers(tmp_path):
    """A test split, and one whose file gives only the best answer."""
    _set(tmp_path, [_question(1)], [])
    (record,) = rows(opened("vqa", tmp_path, **{**_OPTIONS, "train_annotations": None}))
    assert record.turns == (("human", "What is it?"),) and record.answers == ()
    assert record.caption == "What is it?"
    put(tmp_path / "a.json", {"annotations": [{"question_id": 1, "multiple_choice_answer": "red"}]})
    assert rows(opened("vqa", tmp_path, **_OPTIONS))[0].answers == ("red",)


def test_images_that_the_file_names(tmp_path):
    _set(tmp_path, [_question(1, "n7", image="000000000042.jpg"), _question(2, "k")], [])
    options = {**_OPTIONS, "train_annotations": None}
    assert rows(opened("vqa", tmp_path, **options))[0].images[0].is_file()
    assert rows(opened("vqa", tmp_path, **options))[1] == "malformed"
    found = rows(opened("vqa", tmp_path, **{**options, "train_image_name": "%s.png"}))
    assert found[1].key == "k.png"


def test_entries_that_are_something_else(tmp_path):
    questions = [
        _question(1), 5, None, {}, _question(None), _question(float("nan")), _question(2, [1]),
        _question(2, text=7), _question(2, 10**40), _question(2, -1), _question(3), _question(4),
        _question(5), _question(1, text=" "), _question(1, text="\ud800"),
        _question(1, image="../x.jpg"),
    ]  # fmt: skip
    annotations = [
        _annotation(1, "a"), 7, {"question_id": []}, _annotation(2, "b"), {"question_id": 3},
        {"question_id": 4, "answers": [{"answer": 5}]},
    ]  # fmt: skip
    found = rows(opened("vqa", _set(tmp_path, questions, annotations), **_OPTIONS))
    assert found[0].answers == ("a",)
    assert found[1:12] == ["malformed"] * 11
    assert found[12:] == ["no answer", "no caption", "not text", "outside root"]


def test_two_sets_of_answers(tmp_path):
    same = [_annotation(1, "a"), _annotation(1, "a")]
    assert len(opened("vqa", _set(tmp_path / "same", [_question(1)], same), **_OPTIONS)) == 1
    other = [_annotation(1, "a"), _annotation(1, "b")]
    with pytest.raises(UserError, match=r"a\.json, annotation 2: question '1' has other answers"):
        opened("vqa", _set(tmp_path / "other", [_question(1)], other), **_OPTIONS)


@pytest.mark.parametrize("pattern", ["x.jpg", "%d-%d.jpg", "%x.jpg", "%%", "%999999999d", "%(a)s"])
def test_image_names_that_hold_no_number(tmp_path, pattern):
    _set(tmp_path, [_question(1)], [])
    with pytest.raises(UserError, match="must hold the image_id's place once") as caught:
        opened("vqa", tmp_path, **{**_OPTIONS, "train_image_name": pattern})
    assert caught.value.key == "data.datasets.mine.train_image_name"


def test_mistakes_are_named(tmp_path):
    _set(tmp_path, [_question(1)], [])
    with pytest.raises(UserError, match=r"no annotation file .*v2_Open.*: a\.json, q\.json"):
        opened("vqa", tmp_path)
    with pytest.raises(UserError, match="no list 'questions'; its keys: annotations, license"):
        opened("vqa", tmp_path, **{**_OPTIONS, "train_questions": "a.json"})


def test_real_questions(shared_data, tmp_path):
    real = shared_data / "coco"
    for name in ("vqa_questions.json", "vqa_annotations.json", "images", "vqa.csv"):
        (tmp_path / name).symlink_to(real / name)
    names = [f"images/{path.name}" for path in (real / "images").glob("*.jpg")]
    folder(tmp_path / "plain", *names)  # in which 'images/…' of the CSV is no link out of it
    options = {
        "train_questions": "vqa_questions.json", "train_annotations": "vqa_annotations.json",
        "train_images": "images", "train_image_name": "%012d.jpg",
    }  # fmt: skip
    found = rows(opened("vqa", tmp_path, **options))
    assert len(found) == 284 and all(len(r.answers) == 10 for r in found)
    assert all(image(r).is_file() for r in found)
    csv = rows(opened("csv", tmp_path, train_anno="vqa.csv", train_images="plain"))
    assert [r.turns for r in found] == [r.turns for r in csv]
    assert [r.answers for r in found] == [r.answers for r in csv]


def test_the_official_packed_files(shared_data, tmp_path):
    real = shared_data / "vqa_text"
    for kind in ("questions", "annotations"):
        (tmp_path / f"{kind}.json.gz").symlink_to(real / f"vqa_{kind}_valid.json.gz")
    (tmp_path / "val2014").mkdir()
    options = {"valid_questions": "questions.json", "valid_annotations": "annotations.json"}
    source = opened("vqa", tmp_path, "valid", **options)
    with gzip.open(tmp_path / "questions.json.gz") as file:
        questions = json.load(file)["questions"]
    assert len(source) == len(questions) == 8977
    for index in range(0, 8977, 97):
        record = source[index]
        assert record.turns[0] == ("human", questions[index]["question"])
        assert record.caption_id == str(questions[index]["question_id"])
        assert record.turns[1][1] in record.answers
        assert record.key == f"COCO_val2014_{questions[index]['image_id']:012d}.jpg"
