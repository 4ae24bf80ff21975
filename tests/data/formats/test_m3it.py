"""Instructions with their images in base64, as M3IT has them."""

import base64
import json
import pickle

import pytest

from engine.errors import UserError
from tests.data.formats.folders import image, images, opened, picture, put, rows


def _text(number=0):
    return base64.b64encode(picture(number)).decode()


def _sample(images=None, **more):
    sample = {"instruction": "Describe.", "inputs": "", "outputs": "A red square.", **more}
    return sample if images is None else {**sample, "image_base64_str": images}


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_rows(tmp_path, name):
    samples = [
        _sample(_text(1)),
        _sample([_text(2)], inputs="Is it blue?", outputs="No."),
        _sample(instruction="Say hello.", outputs="Hello."),
    ]
    put(tmp_path / name, samples)
    source = opened("m3it", tmp_path, train_anno=name)
    first, second, third = rows(source)
    assert (image(first), first.caption) == (picture(1), "A red square.")
    assert first.turns == (("human", "Describe."), ("gpt", "A red square."))
    assert image(second) == picture(2)
    assert second.turns == (("human", "Describe.\nIs it blue?"), ("gpt", "No."))
    assert image(third) is None and third.caption == "Hello."
    assert len(set(source.column("image_id").tolist())) == 3
    assert rows(pickle.loads(pickle.dumps(source))) == [first, second, third]


def test_images_are_not_copied(tmp_path):
    """The table holds places in the file, not images."""
    big = base64.b64encode(b"x" * 3_000_000).decode()
    put(tmp_path / "train.jsonl", [_sample(big), _sample([big])])
    source = opened("m3it", tmp_path)
    assert [len(image(record)) for record in rows(source)] == [3_000_000] * 2
    assert source.parts.path.stat().st_size < 50_000


def test_files_of_several_tasks(tmp_path):
    for task in ("vqa", "caption"):
        put(tmp_path / task / "train.jsonl", [_sample(_text(len(task)), outputs=task)])
        put(tmp_path / task / "val.jsonl", [_sample(_text(9), outputs="held out")])
    found = rows(opened("m3it", tmp_path, train_anno="*/train.jsonl"))
    assert [r.caption for r in found] == ["caption", "vqa"]
    assert [image(r) for r in found] == [picture(7), picture(3)]
    files = ["vqa/train.jsonl", "caption/train.jsonl"]
    assert [r.caption for r in rows(opened("m3it", tmp_path, train_anno=files))] == files_tasks(
        files
    )
    assert len(opened("m3it", tmp_path, "valid", valid_anno="**/val.jsonl")) == 2


def files_tasks(files):
    return [file.partition("/")[0] for file in files]


def test_several_images(tmp_path):
    put(tmp_path / "train.jsonl", [_sample([_text(1), _text(2)]), _sample(_text(3)), _sample([])])
    assert [image(r) for r in rows(opened("m3it", tmp_path))] == [picture(1), picture(3), None]
    assert rows(opened("m3it", tmp_path, several_images="refuse"))[0] == "several images"
    source = opened("m3it", tmp_path, several_images="all")
    assert [images(r)[1:] for r in rows(source)] == [[picture(2)], [], []]


def test_entries_that_are_something_else(tmp_path):
    samples = [
        _sample(_text(1)), 1, None, [], {}, _sample(5), _sample([5]), _sample({"a": 1}),
        _sample(outputs=7), _sample(outputs=None), _sample(instruction=[]), _sample(inputs=7.5),
        _sample(id=float("nan")), _sample(""), _sample("a"), _sample(outputs="\ud800"),
        _sample(outputs=" "),
    ]  # fmt: skip
    put(tmp_path / "train.jsonl", samples)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"instruction": \n' + "[" * 100_000 + "\n")
    found = rows(opened("m3it", tmp_path))
    assert image(found[0]) == picture(1)
    assert found[1:13] == ["malformed"] * 12
    assert found[13:17] == ["missing", "corrupt", "not text", "no answer"]
    assert found[17:] == ["malformed"] * 2


def test_a_file_that_changes_under_a_run(tmp_path):
    path = put(tmp_path / "train.jsonl", [_sample(_text(1)), _sample(_text(2))])
    source = opened("m3it", tmp_path)
    path.write_text("{}")
    assert rows(source) == ["changed file"] * 2
    path.unlink()
    assert rows(pickle.loads(pickle.dumps(source))) == ["missing"] * 2


def test_mistakes_are_named(tmp_path):
    put(tmp_path / "sub" / "val.jsonl", [_sample(_text(1))])
    with pytest.raises(UserError, match=r"no files train\.jsonl in .*: sub/val\.jsonl") as caught:
        opened("m3it", tmp_path)
    assert caught.value.key == "data.datasets.mine.train_anno"
    for pattern in ("../*.jsonl", "/etc/passwd"):
        with pytest.raises(UserError, match="must name files inside"):
            opened("m3it", tmp_path, train_anno=pattern)
    put(tmp_path / "train.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(UserError, match=r"no 'instruction'; its keys: answer, question"):
        opened("m3it", tmp_path)
    (tmp_path / "train.jsonl.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack it first"):
        opened("m3it", tmp_path, train_anno="train.jsonl.gz")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_texts_that_json_spells_otherwise(tmp_path, name):
    """Slashes and lines that are escaped, behind texts that are not ASCII; data addresses."""
    text = base64.b64encode(b"\xff" * 30).decode()  # all slashes
    spelled = text[:20] + "\n" + text[20:]
    samples = [
        {"about": 'é漢 " \\', **_sample([text, spelled])},
        _sample(f"data:image/png;base64,{text}"),
    ]
    content = json.dumps(samples, ensure_ascii=False).replace("/", "\\/")
    if name.endswith("l"):
        lines = (json.dumps(each, ensure_ascii=False) for each in samples)
        content = "\n".join(lines).replace("/", "\\/")
    (tmp_path / name).write_text(content, encoding="utf8")
    found = rows(opened("m3it", tmp_path, train_anno=name, several_images="all"))
    assert [images(row) for row in found] == [[b"\xff" * 30] * 2, [b"\xff" * 30]]


def test_texts_that_are_not_text(tmp_path):
    """Escapes that are not characters, and bytes that are not UTF-8, beside them."""
    lines = [
        b'{"about": "\xff", "instruction": "x", "outputs": "y", "image_base64_str": "\\udc80/"}',
        b'{"about": "\xff", "instruction": "x", "outputs": "y", "image_base64_str": "\\ud800"}',
        json.dumps(_sample(_text(1))).encode(),
    ]
    for name, content in (("a.jsonl", b"\n".join(lines)), ("a.json", b"[%s]" % b",".join(lines))):
        (tmp_path / name).write_bytes(content)
        found = rows(opened("m3it", tmp_path, train_anno=name))
        assert found[1] == "not text" and found[0] in ("corrupt", "not text", "unreadable")
        assert image(found[2]) == picture(1)
