"""CSV files as memory-mapped tables; Python's own csv module is the oracle."""

import csv
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.tables import csv_table
from engine.data.tables import table as tables
from engine.data.tables.csv_table import open_csv
from engine.data.tables.paths import ImageRoot
from engine.data.tables.source import Tables, TableSource
from engine.errors import UserError
from engine.types import BadSample

_HEADER = ("image", "image_id", "caption", "caption_id")


def _write(path: Path, rows, header=_HEADER, delimiter=",") -> Path:
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _open(path: Path, **options):
    return open_csv(path, cache_dir=path.parent / "elsewhere", **options)


def row(table, index):
    """A row as the table keeps it, by the names of the columns that the table has."""
    block, place = table.at(index)
    found = {name: block.read[name](place) for name in table.schema.names}
    images = found.pop("images")
    return {"image": images and images[0][0], **found}


def _rows(table, names=_HEADER):
    return [tuple(row(table, i).get(name) for name in names) for i in range(len(table))]


def source(table):
    return TableSource("mine", "train", Tables(table), ImageRoot(table.path.parent))


_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(_TEXT, _TEXT, _TEXT), min_size=1, max_size=8))
def test_reads_what_csv_reads(tmp_path, cells):
    """Quotes, commas, newlines inside a caption and any script."""
    rows = [(f"{i}.jpg", *cell) for i, cell in enumerate(cells)]
    path = _write(tmp_path / "train_anno.csv", rows)
    with path.open(newline="", encoding="utf8") as file:
        expected = [tuple(row) for row in csv.reader(file)][1:]
    for old in tmp_path.glob(".engine_cache/*"):
        old.unlink()
    assert _rows(_open(path)) == expected == rows


def test_words_that_look_like_nothing_stay_words(tmp_path):
    rows = [("a.jpg", "007", "NA", "1"), ("b.jpg", "1e3", "null", "true"), ("c.jpg", "", "nan", "")]
    assert _rows(_open(_write(tmp_path / "a.csv", rows))) == rows


def test_other_columns_order_and_separator(tmp_path):
    path = _write(
        tmp_path / "cc.tsv",
        [("9", "a dog, running", "x/1.jpg"), ("8", "a cat", "x/2.jpg")],
        header=("score", "title", "filepath"),
        delimiter="\t",
    )
    assert _rows(_open(path)) == [
        ("x/1.jpg", None, "a dog, running", None),
        ("x/2.jpg", None, "a cat", None),
    ]
    found = [source(_open(path))[n] for n in range(2)]
    assert [(r.image_id, r.caption_id) for r in found] == [("x/1.jpg", "0"), ("x/2.jpg", "1")]


def test_named_columns(tmp_path):
    path = _write(tmp_path / "a.csv", [("x.jpg", "a", "b")], header=("image", "caption", "long"))
    assert row(_open(path), 0)["caption"] == "a"
    assert row(_open(path, names={"caption": "long"}), 0)["caption"] == "b"
    with pytest.raises(UserError, match=r"no column for the caption \(short\).*image, caption"):
        _open(path, names={"caption": "short"})


def test_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffimage,caption\na.jpg,é\n".encode())
    found = source(_open(path))[0]
    assert (found.key, found.image_id, found.caption, found.caption_id) == (
        "a.jpg", "a.jpg", "é", "0"
    )  # fmt: skip


def test_many_blocks(tmp_path, monkeypatch):
    """Rows and codes run through the blocks in which the file is read."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4096)
    rows = [(f"{i // 5}.jpg", str(i // 5), f"caption {i}\nline", str(i)) for i in range(3000)]
    table = _open(_write(tmp_path / "a.csv", rows))
    assert len(table) == 3000
    assert len(table.batches) > 10
    assert _rows(table) == rows
    np.testing.assert_array_equal(source(table).column("image_id"), np.arange(3000) // 5)
    assert list(table.values("caption")) == [row[2] for row in rows]
    with pytest.raises(IndexError, match="row 3000 of 3000"):
        table.at(3000)
    with pytest.raises(IndexError):
        table.at(-1)


def test_caption_ids_count_on_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4096)
    rows = [(f"{i}.jpg", "some words to fill a block") for i in range(500)]
    table = _open(_write(tmp_path / "a.csv", rows, header=("image", "caption")))
    found = source(table)
    assert [found[i].caption_id for i in range(500)] == [str(i) for i in range(500)]
    assert found.column("caption_id").tolist() == list(range(500))


def test_built_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.csv", [("a.jpg", "0", "old", "0")])
    first = _open(path)
    with monkeypatch.context() as patch:
        patch.setattr(csv_table, "_batches", lambda *_: pytest.fail("built again"))
        assert _rows(_open(path)) == _rows(first)
    _write(path, [("a.jpg", "0", "new", "0")])
    os.utime(path, ns=(0, 12345))
    assert row(_open(path), 0)["caption"] == "new"
    assert row(first, 0)["caption"] == "old"  # an open table keeps its pages
    assert len(list((tmp_path / ".engine_cache").glob("*.arrow"))) == 1


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """The table is kept in the cache folder then."""
    path = _write(tmp_path / "a.csv", [("a.jpg", "0", "text", "0")])
    monkeypatch.setattr(os, "access", lambda *_: False)
    table = open_csv(path, cache_dir=tmp_path / "cache")
    assert row(table, 0)["caption"] == "text"
    assert table.path.is_relative_to(tmp_path / "cache")
    assert not (tmp_path / ".engine_cache").exists()


def test_cache_that_cannot_be_written(tmp_path):
    path = _write(tmp_path / "a.csv", [("a.jpg", "0", "text", "0")])
    (tmp_path / ".engine_cache").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the table of .*a\.csv"):
        _open(path)


def test_pickles_as_a_path(tmp_path):
    rows = [(f"{i}.jpg", str(i), "words " * 50, str(i)) for i in range(1000)]
    table = _open(_write(tmp_path / "a.csv", rows))
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    assert _rows(pickle.loads(pickled)) == rows


@pytest.mark.parametrize(
    "image",
    ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "a/..", "C:/x.jpg", "..\\x.jpg", "~/x.jpg"],
)
def test_paths_that_leave_the_folder(tmp_path, image):
    path = _write(tmp_path / "a.csv", [("a.jpg", 0, "x", 0), (image, 1, "y", 1)])
    with pytest.raises(UserError, match=r"row 2 of .*a\.csv names an image outside"):
        _open(path)
    assert not list(tmp_path.glob(".engine_cache/*.arrow"))


def test_harmless_dots(tmp_path):
    images = ["a..b.jpg", "..a.jpg", "x/...jpg", "./a.jpg", "a./b.jpg"]
    path = _write(tmp_path / "a.csv", [(name, 0, "x", 0) for name in images])
    assert [row[0] for row in _rows(_open(path))] == images


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"image,image_id,caption,caption_id\n", "has no rows"),
        (b"picture,caption\na.jpg,b\n", r"no column for the image \(image or.*: picture, caption"),
        (b"image;words\na.jpg;b\n", r"no column caption or .*its columns are: image, words"),
        (b"image,scores\na.jpg,b\n", r"no column caption or title or text or question or labels"),
        ("image,caption\na,b\n".encode("utf-16"), "is UTF-16"),
        (b'"image,caption\na,b\n', "image,caption"),
        (b"image,caption\na.jpg," + b"x" * 9_000_000 + b"\n", "cannot read .*straddl"),
        (b"image,caption\na.jpg,b\nc.jpg,d,e\n", "cannot read .*Row #3: Expected 2 columns, got 3"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        _open(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read annotation file .*none\.csv: No such file"):
        _open(tmp_path / "none.csv")


@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
def test_separators(tmp_path, mark):
    rows = [("a.jpg", "one, two; three | four\tfive", "7"), ("b.jpg", "six", "8")]
    header = ("image", "caption", "image_id")
    table = _open(_write(tmp_path / "a.csv", rows, header=header, delimiter=mark))
    assert [(r[0], r[2], r[1]) for r in _rows(table)] == rows


def test_questions_answers_and_labels(tmp_path):
    path = _write(
        tmp_path / "a.csv",
        [("a.jpg", "What?", "no|a cat|a cat", "cat|sofa"), ("b.jpg", "Who?", "", "")],
        header=("image", "question", "answers", "labels"),
    )
    table = _open(path)
    assert row(table, 0)["caption"] == "What? a cat"
    assert row(table, 0)["answers"] == ("no", "a cat", "a cat")
    assert row(table, 0)["labels"] == ("cat", "sofa")
    assert row(table, 1)["caption"] == "Who?"


def test_labels_alone_are_the_caption(tmp_path):
    path = _write(tmp_path / "a.csv", [("a.jpg", "cat|sofa")], header=("file_name", "labels"))
    assert row(_open(path), 0)["caption"] == "cat, sofa"


def test_a_column_that_is_named_has_no_other_meaning(tmp_path):
    path = _write(tmp_path / "a.csv", [("x.jpg", "yes")], header=("image", "answer"))
    table = _open(path, names={"labels": "answer", "image_id": "image"})
    assert row(table, 0) == {
        "image": "x.jpg", "image_id": "x.jpg", "caption": "yes", "labels": ("yes",),
        "cause": None, "detail": None,
    }  # fmt: skip


def test_columns_of_the_same_name(tmp_path):
    path = _write(tmp_path / "a.csv", [("x.jpg", "1", "2")], header=("image", "caption", "caption"))
    assert row(_open(path), 0)["caption"] == "1"


@pytest.mark.parametrize(
    "row", [b"a.jpg,\xff\xfe,7", b"\xff.jpg,text,7", b"a.jpg,text,\xff"], ids=["text", "name", "id"]
)
def test_bytes_that_are_not_text(tmp_path, row):
    """They spoil their row alone."""
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"image,caption,image_id,b\xe9\nb.jpg,before,1,\n" + row + b",\nc.jpg,after,2,\n"
    )
    table = _open(path)
    found = source(table)
    assert [found[0].caption, found[2].caption] == ["before", "after"]
    with pytest.raises(BadSample, match="not text: row 2 is not UTF-8"):
        found[1]
    codes = found.column("image_id").tolist()
    assert codes[0] != codes[2]


def test_a_name_with_a_pattern_in_it(tmp_path):
    """Old tables are removed by name, not by pattern."""
    for name in ("a[1].csv", "a1.csv"):
        _open(_write(tmp_path / name, [("a.jpg", "0", name, "0")]))
    path = _write(tmp_path / "a[1].csv", [("a.jpg", "0", "longer than before", "0")])
    assert row(_open(path), 0)["caption"] == "longer than before"
    assert len(list((tmp_path / ".engine_cache").glob("*.arrow"))) == 2
