"""CSV files as memory-mapped tables; Python's own csv module is the oracle."""

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data import table as tables
from engine.data.table import open_csv
from engine.errors import UserError

_HEADER = ("image", "image_id", "caption", "caption_id")


def _write(path: Path, rows, header=_HEADER, delimiter=",") -> Path:
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _open(path: Path, **options):
    return open_csv(path, cache_dir=path.parent / "elsewhere", **options)


def _rows(table):
    return [tuple(table.row(i).values()) for i in range(len(table))]


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
        ("x/1.jpg", "x/1.jpg", "a dog, running", "0"),
        ("x/2.jpg", "x/2.jpg", "a cat", "1"),
    ]


def test_named_columns(tmp_path):
    path = _write(tmp_path / "a.csv", [("x.jpg", "a", "b")], header=("image", "caption", "long"))
    assert _open(path).row(0)["caption"] == "a"
    assert _open(path, names={"caption": "long"}).row(0)["caption"] == "b"
    with pytest.raises(UserError, match=r"no column for the caption \(short\).*image, caption"):
        _open(path, names={"caption": "short"})


def test_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffimage,caption\na.jpg,é\n".encode())
    assert _open(path).row(0) == {
        "image": "a.jpg", "image_id": "a.jpg", "caption": "é", "caption_id": "0"
    }  # fmt: skip


def test_many_blocks(tmp_path, monkeypatch):
    """Rows and codes run through the blocks in which the file is read."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 4096)
    rows = [(f"{i // 5}.jpg", str(i // 5), f"caption {i}\nline", str(i)) for i in range(3000)]
    table = _open(_write(tmp_path / "a.csv", rows))
    assert len(table) == 3000
    assert [tuple(table.row(i).values()) for i in (0, 1499, 2999)] == [
        rows[0], rows[1499], rows[2999]
    ]  # fmt: skip
    np.testing.assert_array_equal(table.codes("image_id"), np.arange(3000) // 5)
    assert list(table.values("caption")) == [row[2] for row in rows]
    with pytest.raises(IndexError, match="row 3000 of 3000"):
        table.row(3000)
    with pytest.raises(IndexError):
        table.row(-1)


def test_caption_ids_count_on_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 4096)
    rows = [(f"{i}.jpg", "some words to fill a block") for i in range(500)]
    table = _open(_write(tmp_path / "a.csv", rows, header=("image", "caption")))
    assert list(table.values("caption_id")) == [str(i) for i in range(500)]


def test_built_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.csv", [("a.jpg", "0", "old", "0")])
    first = _open(path)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_convert", lambda *_: pytest.fail("built again"))
        assert _rows(_open(path)) == _rows(first)
    _write(path, [("a.jpg", "0", "new", "0")])
    os.utime(path, ns=(0, 12345))
    assert _open(path).row(0)["caption"] == "new"
    assert first.row(0)["caption"] == "old"  # an open table keeps its pages
    assert len(list((tmp_path / ".engine_cache").glob("*.arrow"))) == 1


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """The table is kept in the cache folder then."""
    path = _write(tmp_path / "a.csv", [("a.jpg", "0", "text", "0")])
    monkeypatch.setattr(os, "access", lambda *_: False)
    table = open_csv(path, cache_dir=tmp_path / "cache")
    assert table.row(0)["caption"] == "text"
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
        (b"image;caption\na.jpg;b\n", "its columns are: image;caption"),
        (b"image,caption\na.jpg,b\nc.jpg,d,e\n", "cannot read .*Row #3: Expected 2 columns, got 3"),
        (b"image,caption\na.jpg,\xff\xfe\n", "cannot read .*UTF8"),
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


_PRIVATE = """
import pickle, random, sys
from pathlib import Path
from engine.data.table import Table

def private():  # KiB that this process shares with nobody
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

warm = Table(Path(sys.argv[1])); warm.row(0)
before = private()
table = Table(Path(sys.argv[1]))
for _ in range(20_000):
    table.row(random.randrange(len(table)))
print(private() - before, len(table))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_worker_holds_next_to_nothing(tmp_path):
    """Private memory of a process that reads all over 300,000 rows (about 40 MB)."""
    path = tmp_path / "a.csv"
    with path.open("w") as file:
        file.write("image,caption\n")
        file.writelines(f"{i}.jpg,{'words of a caption ' * 5}{i}\n" for i in range(300_000))
    table = _open(path)
    result = subprocess.run(
        [sys.executable, "-c", _PRIVATE, str(table.path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    grown_kib, length = map(int, result.stdout.split())
    assert length == 300_000
    assert grown_kib < 4_000
