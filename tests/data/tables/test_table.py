"""Tables: what is kept beside them, and what a process that reads one holds in memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import cache
from engine.data.tables.csv_table import open_csv
from engine.data.tables.source import Tables, TableSource
from engine.data.tables.table import PLACE, Block, Table, open_table
from engine.errors import UserError


def _write(path: Path, **columns) -> None:
    made = pa.record_batch([pa.array(values) for values in columns.values()], names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, made.schema) as writer:
        for start in range(0, made.num_rows, 2):
            writer.write_batch(made.slice(start, 2))


def _source(path: Path, **columns) -> TableSource:
    if columns:
        _write(path, **columns)
    return TableSource("mine", "train", Tables(Table(path)))


def test_columns_are_kept_beside_the_table(tmp_path, monkeypatch):
    path = tmp_path / "a.arrow"
    source = _source(path, image_id=["x", "y", None, "x", "z"], label=[3, None, 4, 1, 5])
    assert source.column("image_id").tolist() == [0, 1, 2, 0, 3]  # the third is "2"
    assert source.column("caption_id").tolist() == [0, 1, 2, 3, 4]
    assert source.column("label").tolist() == [3, -1, 4, 1, 5]
    assert Table(path).has_values("image_id") and not Table(path).has_values("turns")
    monkeypatch.setattr(TableSource, "_codes", lambda *_: pytest.fail("encoded again"))
    again = _source(path).column("image_id")
    assert isinstance(again, np.memmap) and again.dtype == np.int64
    assert again.tolist() == [0, 1, 2, 0, 3]


def test_columns_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    source = _source(tmp_path / "a.arrow", image_id=["x", "y", "x"])

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache, "build_cached", refuse)
    assert source.column("image_id").tolist() == [0, 1, 0]


_TEXT = st.none() | st.text(max_size=3)
_TURNS = st.lists(st.tuples(st.sampled_from(["human", "gpt"]), st.text(max_size=2)), max_size=3)
_PLACES = st.lists(
    st.tuples(_TEXT, st.none() | st.integers(0, 9), st.integers(0, 99), st.integers(0, 99)),
    max_size=3,
)


@given(st.lists(st.tuples(_TEXT, st.none() | st.integers(), _TURNS, _PLACES), min_size=1))
def test_rows_are_read_as_arrow_reads_them(rows):
    """Integers, texts, lists and structs, with and without gaps; wide offsets as well."""
    captions, labels, turns, images = zip(*rows, strict=True)
    labels = [label and label % 1000 for label in labels]
    for texts in (pa.string(), pa.large_string()):
        batch = pa.record_batch(
            [
                pa.array(images, pa.list_(PLACE)),
                pa.array(captions, texts),
                pa.array(labels, pa.int64()),
                pa.array(turns, pa.large_list(pa.struct([("role", texts), ("text", texts)]))),
            ],
            names=["images", "caption", "label", "turns"],
        )
        block = Block(batch)
        for index in range(len(rows)):
            assert block.read["caption"](index) == captions[index]
            assert block.read["label"](index) == labels[index]
            assert block.read["turns"](index) == (tuple(map(tuple, turns[index])) or None)
            assert block.read["images"](index) == (tuple(map(tuple, images[index])) or None)
            assert block.read["answers"](index) is None


def test_inputs_and_options_tell_tables_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for value in ("x", "y"):
        batches = lambda value=value: [pa.record_batch({"caption": [value]})]  # noqa: E731
        table = open_table([path], value, batches, cache_dir=tmp_path)
        assert list(table.values("caption")) == [value]
    with pytest.raises(UserError, match=r"cannot read annotation file .*none: No such file"):
        open_table([tmp_path / "none"], "", list, cache_dir=tmp_path)


_WORKER = """
import json, random, sys, time
from pathlib import Path
from engine.data.tables.source import Tables, TableSource
from engine.data.tables.paths import ImageRoot
from engine.data.tables.table import Table
import numpy as np

def private(files):  # bytes that this process shares with nobody, pages of the files left out
    total, counted = 0, True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and len(words) >= 5:
            counted = not any(line.endswith(name) for name in files)
        elif counted and words[0] in ("Private_Clean:", "Private_Dirty:"):
            total += int(words[1]) * 1024
    return total

path = Path(sys.argv[1])
files = [".arrow", ".npy"]
def opened(path):
    return TableSource("mine", "train", Tables(Table(path)), ImageRoot(path.parent))

warm = opened(Path(sys.argv[2])); warm[0]; warm.column("image_id")[:1].sum()
before, start = private(files), time.perf_counter()
source = opened(path)
source[len(source) - 1]
codes = source.column("image_id")
seconds = time.perf_counter() - start
for _ in range(20_000):
    row = random.randrange(len(source)); source[row]; codes[row]
for caption, _ in zip(source.captions(), range(500_000)): pass
print(json.dumps([seconds, private(files) - before, len(source)]))
"""


def _table(path: Path, num_rows: int) -> Table:
    block = 10_000
    with path.open("w") as file:
        file.write("image,image_id,caption\n")
        for start in range(0, num_rows, block):
            file.writelines(
                f"{i // 5:08d}.jpg,{i // 5},a caption of some length about picture {i}\n"
                for i in range(start, start + block)
            )
    return open_csv(path, cache_dir=path.parent)


def _measure(tmp_path: Path, num_rows: int) -> tuple[float, int, float]:
    """Seconds to open, private bytes of a process that reads all over, seconds to convert."""
    start = time.perf_counter()
    table, small = _table(tmp_path / "a.csv", num_rows), _table(tmp_path / "small.csv", 10_000)
    for each in (table, small):
        _source(each.path).column("image_id")
    converted = time.perf_counter() - start
    result = subprocess.run(
        [sys.executable, "-c", _WORKER, str(table.path), str(small.path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds, grown, length = json.loads(result.stdout)
    assert length == num_rows
    return seconds, grown, converted


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


@needs_proc
def test_a_worker_holds_next_to_nothing(tmp_path):
    seconds, grown, _ = _measure(tmp_path, 200_000)
    assert grown < 12e6
    assert seconds < 1


@needs_proc
@pytest.mark.slow
def test_ten_million_captions(tmp_path):
    """Opening takes at most 2 s and 100 MB of private memory once the table is made."""
    seconds, grown, converted = _measure(tmp_path, 10_000_000)
    print(f"\nopened in {seconds:.3f} s, {grown / 1e6:.1f} MB private; made in {converted:.0f} s")
    assert seconds < 2
    assert grown < 100e6
