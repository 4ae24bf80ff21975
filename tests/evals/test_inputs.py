"""Files of questions: every form, images by name and by number, and what is wrong."""

import json

import pytest

from engine.errors import UserError
from engine.evals.inputs import Questions
from engine.types import BadSample
from tests.data.formats.folders import image

OFFICIAL = [
    {"question_id": 420, "image_id": 42, "question": "What?"},
    {"question_id": 421, "image_id": 7, "question": "Where?"},
    {"question_id": 422, "image_id": 9, "question": "Who?"},
    {"question_id": 423, "image_id": "named", "question": "How?"},
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name in ("COCO_val2014_000000000042.jpg", "7.png", "more/000007.jpg", "named.png"):
        (folder / name).write_bytes(b"x")
    return folder


def write(tmp_path, name, content):
    path = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf8")
    return path


@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "list.json"])
def test_images_by_their_number(tmp_path, images, name):
    content = {"questions": OFFICIAL} if name == "q.json" else OFFICIAL
    if name == "q.jsonl":
        content = "\n".join(map(json.dumps, OFFICIAL))
    source = Questions(write(tmp_path, name, content), images)
    first = source[0]
    assert image(first) == images / "COCO_val2014_000000000042.jpg"
    assert (first.image_id, first.caption_id, first.turns) == ("42", "420", (("human", "What?"),))
    assert image(source[3]) == images / "named.png"
    with pytest.raises(BadSample, match="image 7: 2 files"):
        source[1]
    with pytest.raises(BadSample, match="image 9: no file"):
        source[2]


def test_a_csv(tmp_path, images):
    text = (
        'image,question,answers\nmore/000007.jpg,"What, here?",a|b|a\n,Alone?,\n../x.jpg,Out?,c\n'
    )
    source = Questions(write(tmp_path, "q.csv", text), images)
    assert len(source) == 3
    assert image(source[0]) == images / "more/000007.jpg"
    assert source[0].turns == (("human", "What, here?"),)
    assert (source[0].answers, source[0].caption_id) == (("a", "b", "a"), "0")
    assert (image(source[1]), source[1].answers) == (None, ())
    with pytest.raises(BadSample, match="outside root"):
        source[2]


def test_images_lie_beside_the_file_by_default(tmp_path, images):
    source = Questions(write(tmp_path, "q.csv", "image,question\nimages/7.png,What?\n"))
    assert image(source[0]) == tmp_path / "images" / "7.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "image,text\na,b\n", "no column question; its columns are: image, text"),
        ("q.csv", "image,question\n", "holds no questions"),
        ("q.csv", "image,question\na\n", "line 2: fewer values"),
        ("q.csv", "image,question\na,b,c\n", "line 2: more values"),
        ("q.json", {"annotations": []}, "holds an object"),
        ("q.json", [{"image": "a"}], "question 1: there is no question"),
        ("q.json", [{"question": "a", "question_id": None}], "question_id is null"),
        ("q.json", [OFFICIAL[0], OFFICIAL[0]], "question_id 420 more than once"),
        ("q.json", "{", "is not JSON"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as raised:
        Questions(write(tmp_path, name, content))
    assert raised.value.key == "generate.input"


def test_a_folder_that_is_not_there(tmp_path):
    path = write(tmp_path, "q.json", OFFICIAL)
    with pytest.raises(UserError, match="there is no folder") as raised:
        Questions(path, tmp_path / "no")
    assert raised.value.key == "generate.images"
