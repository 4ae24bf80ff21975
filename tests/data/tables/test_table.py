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

from engine.data.tables import table as tables
from engine.data.tables.csv_table import open_csv
from engine.data.tables.table import Table, cached_file, open_table
from engine.errors import UserError


def _write(path: Path, **columns) -> None:
    made = pa.record_batch([pa.array(values) for values in columns.values()], names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, made.schema) as writer:
        for start in range(0, made.num_rows, 2):
            writer.write_batch(made.slice(start, 2))


def test_codes_are_kept_beside_the_table(tmp_path, monkeypatch):
    _write(tmp_path / "a.arrow", name=["x", "y", None, "x", "z"], number=[3, 1, 4, 1, 5])
    table = Table(tmp_path / "a.arrow")
    assert table.codes("name").tolist() == [0, 1, -1, 0, 2]
    assert table.integers("number").tolist() == [3, 1, 4, 1, 5]
    assert table.has_values("name")
    monkeypatch.setattr(Table, "_encoded", lambda *_: pytest.fail("encoded again"))
    again = Table(tmp_path / "a.arrow").codes("name")
    assert isinstance(again, np.memmap) and again.dtype == np.int64
    assert again.tolist() == [0, 1, -1, 0, 2]


def test_codes_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    _write(tmp_path / "a.arrow", name=["x", "y", "x"])

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(tables, "make_once", refuse)
    assert Table(tmp_path / "a.arrow").codes("name").tolist() == [0, 1, 0]


def test_a_file_made_of_several(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    made = []
    for path in paths:
        path.write_text("old")

    def opened():
        return cached_file(
            paths, "joined", lambda to: made.append(to) or to.write_text("x"),
            cache_dir=tmp_path, ending="txt",
        )  # fmt: skip

    first = opened()
    assert opened() == first and len(made) == 1
    paths[1].write_text("newer")
    second = opened()
    assert second != first and len(made) == 2 and not first.exists()


def test_inputs_and_options_tell_tables_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for value in ("x", "y"):
        table = open_table([path], value, lambda to, v=value: _write(to, a=[v]), cache_dir=tmp_path)
        assert table.row(0) == {"a": value}
    with pytest.raises(UserError, match=r"cannot read annotation file .*none: No such file"):
        open_table([tmp_path / "none"], "", lambda to: None, cache_dir=tmp_path)


_WORKER = """
import json, random, sys, time
from pathlib import Path
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
warm = Table(Path(sys.argv[2])); warm.row(0); warm.codes("image_id")[:1].sum()
before, start = private(files), time.perf_counter()
table = Table(path)
table.row(len(table) - 1)
codes = table.codes("image_id")
seconds = time.perf_counter() - start
for _ in range(20_000):
    row = random.randrange(len(table)); table.row(row); codes[row]
for caption, _ in zip(table.values("caption"), range(500_000)): pass
print(json.dumps([seconds, private(files) - before, len(table)]))
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
        each.codes("image_id")
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
