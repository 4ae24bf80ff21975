"""Rows → table → source: what is filled in, what spoils a row, what spoils the file."""

from dataclasses import replace

import numpy as np
import pytest

from engine.data.tables import table as tables
from engine.data.tables.paths import ImageRoot
from engine.data.tables.source import damage_report, open_rows
from engine.data.tables.table import Table, file_named, row_or_fault
from engine.data.tables.values import (
    answers,
    caption_of,
    conversation,
    identity,
    most_common,
    question_caption,
)
from engine.errors import UserError
from engine.types import BadSample, Row
from tests.data.formats.folders import image


def _source(tmp_path, rows, **options):
    path = tmp_path / "anno.txt"
    path.write_text("x")
    return open_rows("mine", "train", [path], "test", lambda: rows, cache_dir=tmp_path, **options)


def shown(name, **fields):
    """A row that shows a file."""
    return Row(images=(file_named(name),), **fields)


def test_what_a_row_lacks_is_made_up(tmp_path):
    rows = [
        shown("a.jpg", caption="x"),
        Row(turns=(("human", "q"), ("gpt", "first"), ("human", "r"), ("gpt", "second"))),
        shown("a.jpg", question="Why?", answers=("no", "so", "so", "")),
        shown("b.jpg", labels=("cat", "dog"), label=4, image_id="7", caption_id="9"),
    ]
    rows = [replace(row, caption=row.caption or caption_of(row)) for row in rows]
    source = _source(tmp_path, rows, images=ImageRoot(tmp_path))
    found = [source[i] for i in range(4)]
    assert [r.caption for r in found] == ["x", "first", "Why? so", "cat, dog"]
    assert [r.image_id for r in found] == ["a.jpg", "1", "a.jpg", "7"]
    assert [r.caption_id for r in found] == ["0", "1", "2", "9"]
    assert [r.key for r in found] == ["a.jpg", "row 2", "a.jpg", "b.jpg"]
    assert [r.label for r in found] == [None, None, None, 4]
    assert image(found[1]) is None and len(found[1].turns) == 4
    assert found[2].turns == (("human", "Why?"), ("gpt", "so"))
    assert found[2].answers == ("no", "so", "so")
    assert source.column("image_id").tolist() == [0, 1, 0, 2]
    assert isinstance(source.column("caption_id"), np.memmap)


def test_rows_are_written_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 7)
    source = _source(tmp_path, (Row(caption=f"c{i}") for i in range(50)))
    assert len(Table(source.parts.path).batches) == 8
    assert list(source.captions()) == [f"c{i}" for i in range(50)]
    assert list(source.captions_of(np.array([49, 0, 7, 7]))) == ["c49", "c0", "c7", "c7"]
    assert source[49].caption_id == "49"


def test_rows_that_cannot_be_used(tmp_path):
    def fail():
        raise BadSample("malformed", "x is: y")

    rows = [
        row_or_fault("entry 1", fail),
        row_or_fault("entry 2", lambda: Row(caption="bytes that were not text: \udcff")),
        shown("a.jpg", caption="  "),
        shown("", caption="x"),
        shown("a.jpg", caption="x"),
        Row(turns=(("human", "What?"), ("gpt", " "))),
    ]
    source = _source(tmp_path, rows)
    told = []
    for index in range(len(rows)):
        with pytest.raises(BadSample) as caught:
            source[index]
        told.append((caught.value.cause, caught.value.detail))
    assert damage_report(source) == ["mine: 2 of 6 samples are lost (malformed: entry 1: x is: y)"]
    assert told == [
        ("malformed", "entry 1: x is: y"),
        ("not text", "entry 2"),
        ("no caption", "row 3"),
        ("missing", "row 4 names no image"),
        ("missing", "row 5 names 'a.jpg'; there is no image folder"),
        ("no answer", "row 6"),
    ]


def test_files_without_usable_rows(tmp_path):
    with pytest.raises(UserError, match=r"anno\.txt has no samples"):
        _source(tmp_path, [])
    with pytest.raises(UserError, match=r"no sample of .*the first: malformed: entry 3"):
        faults = [Row(cause="malformed", detail=f"entry {number}") for number in (3, 4)]
        _source(tmp_path, faults)
    assert len(_source(tmp_path, [Row(cause="malformed", detail="1"), Row(caption="x")])) == 2


def test_an_image_root(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in_private").mkdir()
    (tmp_path / "in" / "same").symlink_to(tmp_path / "in" / "sub")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "in_private")
    root = ImageRoot(tmp_path / "in")
    for name in ("x" * 5000, "a.jpg", "sub/a.jpg", "./a.jpg", "a..b.jpg", "same/a.jpg"):
        assert root.path(name) == tmp_path / "in" / name
    for name in ("other/a.jpg", "..", "../in/a.jpg", "sub/../../x", "/a.jpg", "~/a.jpg", "a\0"):
        with pytest.raises(BadSample) as caught:
            root.path(name)
        assert caught.value.cause == "outside root"
    assert ImageRoot(tmp_path / "in" / "same").path("a.jpg").name == "a.jpg"


def test_ids():
    assert [identity(value, "id") for value in (7, "x", "", -1)] == ["7", "x", "", "-1"]
    for value in (True, 1.0, float("nan"), None, [], 10**200):
        with pytest.raises(BadSample, match=r"the id is .*, not an id"):
            identity(value, "the id")


def test_answers_and_captions():
    assert answers([{"answer": "a"}, "b"]) == ("a", "b")
    assert answers(None) == () and answers("one") == ("one",)
    with pytest.raises(BadSample, match="no 'answer'; its keys: text"):
        answers([{"text": "a"}])
    assert most_common(["b", "a", "a", "b"]) == "b" and most_common([]) == ""
    assert question_caption("Q?", []) == "Q?" and question_caption(" ", ["a"]) == ""


def test_a_turn_that_is_none():
    with pytest.raises(BadSample, match="turn 2 is 'x', not an object"):
        conversation([{"from": "human", "value": "a"}, "x"])
    with pytest.raises(BadSample, match="turn 1 is a list, not a text"):
        conversation([{"from": "human", "value": []}])
