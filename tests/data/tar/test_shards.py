"""Shards through their indexes: the bytes that tarfile reads, staleness, damage, many at once."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import tarfile
import tracemalloc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from engine.data import image_files
from engine.data.tables.source import damage_report
from engine.data.tables.table import Table
from engine.data.tar import index as tar_index
from engine.data.tar import shards as tar_shards
from engine.data.tar.shards import open_shards
from engine.data.tar.texts import TextForm
from engine.data.views import Concatenated, Subset
from engine.errors import FaultError, UserError
from engine.types import BadSample
from tests.data.formats.folders import image
from tests.data.tar.tar_files import pairs, picture, write_tar

CUTS = 400


def source(root, names=None, cache=None, **options):
    names = names or sorted(path.name for path in root.glob("*.tar"))
    given = {"name": "web", "split": "train", "root": root, "key": "data.datasets.web.train"}
    cache = cache or root / "cache"
    return open_shards([str(root / n) for n in names], cache_dir=cache, **given | options)


def shards(root, counts, fields=None):
    first = 0
    for number, count in enumerate(counts):
        write_tar(root / f"{number:05d}.tar", pairs(range(first, first + count), fields))
        first += count
    return root


def all_rows(rows):
    """Each row's record, or the cause that it has none."""
    for index in range(len(rows)):
        try:
            yield rows[index]
        except BadSample as bad:
            yield bad


def test_rows_are_what_tarfile_reads(tmp_path):
    found = source(shards(tmp_path, [3, 1, 5]))
    assert (found.name, found.split, len(found)) == ("web", "train", 9)
    assert found.blocks.tolist() == [3, 1, 5]
    members = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {m.name: tar.extractfile(m).read() for m in tar}
    for index, record in enumerate(all_rows(found)):
        assert image(record) == members[f"{index:05d}.jpg"] == picture(index)
        assert record.caption == members[f"{index:05d}.txt"].decode() == f"row {index}"
    assert found[3].key == "00001.tar/00003.jpg"
    assert list(found.captions()) == [f"row {index}" for index in range(9)]
    with pytest.raises(IndexError):
        found[9]
    with pytest.raises(IndexError):
        found[-1]


def test_ids_are_made_where_none_are_given(tmp_path):
    found = source(shards(tmp_path, [2, 2]))
    records = list(all_rows(found))
    assert len({record.image_id for record in records}) == 4
    assert [record.caption_id for record in records] == ["0", "1", "2", "3"]
    assert found.column("image_id").tolist() == [0, 1, 2, 3]
    assert found.column("caption_id").tolist() == [0, 1, 2, 3]
    assert found.column("label").tolist() == [-1] * 4


def test_given_ids_and_several_captions(tmp_path):
    one = {"image_id": 5, "captions": ["x", "y"], "label": 2}
    other = {"image_id": "z", "caption": "w", "caption_id": "c"}
    members = [
        ("a.jpg", b"1"), ("a.json", json.dumps(one).encode()),
        ("b.jpg", b"2"), ("b.json", json.dumps(other).encode()), *pairs([7]),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("c.jpg", b"3"), ("c.json", json.dumps(one).encode())])
    found = source(tmp_path)
    assert found.column("image_id").tolist() == [0, 0, 1, 2, 0, 0]
    assert found.column("label").tolist() == [2, 2, -1, -1, 2, 2]
    codes = found.column("caption_id")
    assert len(set(codes.tolist())) == 6
    records = list(all_rows(found))
    assert [r.caption for r in records] == ["x", "y", "w", "row 7", "x", "y"]
    assert [image(r) for r in records[:3]] == [b"1", b"1", b"2"]
    assert [r.label for r in records] == [2, 2, None, None, 2, 2]
    assert records[2].caption_id == "c"
    ids = [r.image_id for r in records]
    assert [ids.index(each) for each in ids] == [0, 0, 2, 3, 0, 0]


def test_pickles_small_and_opens_again(tmp_path):
    found = source(shards(tmp_path, [3, 3]))
    record = found[4]
    content = pickle.dumps(found)
    assert len(content) < 1000
    assert pickle.loads(content)[4] == record


def test_an_index_is_made_once_and_used_again(tmp_path, monkeypatch):
    source(shards(tmp_path, [2, 2]))
    monkeypatch.setattr(tar_index, "write_index", lambda *a: pytest.fail("indexed again"))
    assert len(source(tmp_path)) == 4
    assert len(source(tmp_path, ["00001.tar"])) == 2  # another list of the same shards


@pytest.mark.parametrize("keep", ["nothing", "time", "time and size"])
def test_a_changed_shard_is_indexed_again(keep, tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, pairs(range(2)))
    assert len(source(tmp_path)) == 2
    before = path.stat()
    write_tar(path, pairs(range(1, 3) if keep == "time and size" else range(1, 4)))
    if keep == "time and size":
        assert path.stat().st_size == before.st_size  # only its first header tells
    if keep != "nothing":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = source(tmp_path)
    assert found[0].caption == "row 1"
    left = [each.name for each in (tmp_path / ".engine_cache").iterdir() if each.name[0] != "."]
    assert len(left) == 2  # of the former state nothing


def test_a_shard_that_changes_while_it_is_read_is_told(tmp_path):
    found = source(shards(tmp_path, [2]))
    write_tar(tmp_path / "00000.tar", pairs(range(5, 9)))
    with pytest.raises(BadSample) as bad:
        image(found[0])
    assert bad.value.cause == "changed file"
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(BadSample) as bad:
        image(found[0])
    assert bad.value.cause == "missing"


def test_a_cache_that_is_emptied_while_it_is_used_is_filled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "_OPEN_INDEXES", 1)
    found = source(shards(tmp_path, [2, 2]))
    assert found[0].caption == "row 0"
    for path in (tmp_path / ".engine_cache").glob("*.index"):
        path.unlink()
    assert found[3].caption == "row 3"
    (next((tmp_path / ".engine_cache").glob("00001*.index"))).write_bytes(b"ARROW1 torn")
    assert found[0].caption == "row 0"
    assert found[2].caption == "row 2"


def test_an_index_torn_by_a_power_cut_is_made_again(tmp_path):
    source(shards(tmp_path, [2, 2]))
    for path in (tmp_path / ".engine_cache").iterdir():
        if path.suffix == ".index":
            path.write_bytes(b"")
        elif path.suffix == ".shards":
            path.unlink()
    assert source(tmp_path)[3].caption == "row 3"


def test_an_index_with_other_rows_is_a_fault(tmp_path):
    found = source(shards(tmp_path, [2, 3]))
    first, second = sorted((tmp_path / ".engine_cache").glob("*.index"))
    shutil.copy(second, first)
    with pytest.raises(FaultError, match="delete both"):
        found[0]


def test_other_texts_are_another_index(tmp_path):
    shards(tmp_path, [1], {"caption": "a", "alt": "b"})
    assert source(tmp_path)[0].caption == "row 0"
    assert source(tmp_path, form=TextForm(caption="alt"))[0].caption == "b"
    assert source(tmp_path)[0].caption == "row 0"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    shards(data, [2])
    may = os.access

    def access(path, mode):
        return data not in (Path(path), *Path(path).parents) and may(path, mode)

    monkeypatch.setattr(os, "access", access)
    found = source(data, cache=tmp_path / "cache")
    assert found[1].caption == "row 1"
    assert not (data / ".engine_cache").exists()
    assert list((tmp_path / "cache").glob("*/*.index"))


def test_what_another_user_indexed_is_used(tmp_path, monkeypatch):
    source(shards(tmp_path, [2]))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tar_index, "write_index", lambda *a: pytest.fail("indexed again"))
    assert source(tmp_path, cache=tmp_path / "none")[1].caption == "row 1"


def _open(root, start, log, write):
    def logged(shard, target, form):
        with log.open("a") as file:
            file.write(f"{shard.name}\n")
        return write(shard, target, form)

    tar_index.write_index = logged
    start.wait()
    assert len(source(root)) == 30


def test_many_processes_at_once_index_once(tmp_path):
    shards(tmp_path, [10, 10, 10])
    context = multiprocessing.get_context("fork")
    start, log = context.Barrier(4), tmp_path / "log"
    arguments = (tmp_path, start, log, tar_index.write_index)
    processes = [context.Process(target=_open, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == ["00000.tar", "00001.tar", "00002.tar"]


def test_several_processes_index_many_shards(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tar_index.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    shards(tmp_path, [2] * 13)
    found = source(tmp_path)
    assert [record.caption for record in all_rows(found)] == [f"row {n}" for n in range(26)]
    assert capfd.readouterr() == ("", "")  # progress is for a terminal alone


def test_missing_shards_are_named(tmp_path):
    shards(tmp_path, [1])
    names = [f"{number:05d}.tar" for number in range(9)]
    with pytest.raises(UserError, match="8 of 9 shards cannot be read") as error:
        source(tmp_path, names)
    assert "00001.tar: No such file" in str(error.value)
    assert "and 3 more" in str(error.value)
    assert error.value.key == "data.datasets.web.train"


def test_a_pipe_in_place_of_a_shard_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    with pytest.raises(UserError, match="2 of 2 shards") as error:
        source(tmp_path)
    assert "a.tar: not a file" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, bytes(10_240)])
def test_shards_without_a_usable_sample(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="no sample that can be used"):
        source(tmp_path)


def test_a_zero_byte_shard_among_others_is_a_lost_row(tmp_path):
    shards(tmp_path, [2, 2])
    (tmp_path / "00000.tar").write_bytes(b"")
    found = source(tmp_path)
    rows = list(all_rows(found))
    assert [getattr(row, "cause", "") for row in rows] == ["empty shard", "", ""]
    assert str(rows[0]) == "empty shard: 00000.tar: 0 bytes"


def test_fewer_samples_than_img2dataset_counted(tmp_path):
    shards(tmp_path, [3])
    for counted, lost in ((3, 0), (2, 0), ("x", 0), (5, 1)):
        (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": counted}))
        os.utime(tmp_path / "00000.tar")
        rows = list(all_rows(source(tmp_path)))
        assert [getattr(row, "cause", "") for row in rows] == [""] * 3 + ["missing samples"] * lost
    assert "2 of the 5 that 00000_stats.json counts" in str(rows[-1])


def test_every_one_of_400_cuts_is_flagged(tmp_path):
    whole = write_tar(tmp_path / "whole", pairs(range(12))).read_bytes()
    generator = random.Random(0)
    ends = [0, 1, 511, 512, 513, len(whole) - 1, len(whole) - 512]
    ends += [generator.randrange(len(whole)) for _ in range(CUTS - len(ends))]
    for number, end in enumerate(ends):
        (tmp_path / f"{number:05d}.tar").write_bytes(whole[:end])
    found = source(tmp_path)
    records = np.split(np.arange(len(found)), np.cumsum(found.blocks)[:-1])
    assert len(records) == CUTS
    for end, rows in zip(ends, records, strict=True):
        read = [next(all_rows(_Only(found, int(row)))) for row in rows]
        bad = [row for row in read if isinstance(row, BadSample)]
        assert {each.cause for each in bad} == {"truncated shard" if end else "empty shard"}
        assert len(bad) == 1
        good = [row for row in read if not isinstance(row, BadSample)]
        before = sum(
            _end_of(whole, f"{n:05d}.txt") <= end and _end_of(whole, f"{n:05d}.jpg") <= end
            for n in range(12)
        )
        assert [image(row) for row in good] == [picture(n) for n in range(before)]


class _Only:
    """One row of a source."""

    def __init__(self, rows, row):
        self.rows, self.row = rows, row

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.rows[self.row]


def _end_of(whole, name, known={}):  # noqa: B006
    if name not in known:
        at = whole.index(name.encode())
        known[name] = at + 512 + int(whole[at + 124 : at + 135], 8)
    return known[name]


def test_an_image_of_any_size_is_not_read_into_memory(tmp_path):
    path = tmp_path / "0.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = 2 << 30
    header = info.tobuf()
    text = write_tar(tmp_path / "text", [("a.txt", b"text"), *pairs([1])]).read_bytes()
    with path.open("wb") as file:
        file.write(header)
        file.seek(512 + info.size)
        file.write(text)
    found = source(tmp_path)
    with pytest.raises(BadSample) as bad:
        image(found[0])
    assert bad.value.cause == "too large"
    assert image(found[1]) == picture(1)


def test_what_a_process_holds_does_not_grow_with_the_rows(tmp_path):
    held = []
    for count in (10, 2000):
        root = tmp_path / str(count)
        root.mkdir()
        write_tar(
            root / "0.tar",
            [m for n in range(count) for m in ((f"{n}.jpg", b"x"), (f"{n}.txt", b"t"))],
        )
        source(root)  # indexed
        tracemalloc.start()
        found = source(root)
        found[count - 1]
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[1] < held[0] + 20_000


def _num_open():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open(tmp_path, monkeypatch):
    opened = image_files._opened.__wrapped__
    monkeypatch.setattr(image_files, "_opened", lru_cache(2)(opened))
    found = source(shards(tmp_path, [1] * 12))
    before = _num_open()
    for index in range(12):
        image(found[index])
    assert _num_open() <= before + 2


def test_an_index_is_read_as_arrow_reads_it(tmp_path):
    source(shards(tmp_path, [5]))
    index = Table(next((tmp_path / ".engine_cache").glob("*.index")))
    (batch,) = index.batches
    assert batch.schema.names == ["key", "images", "caption"]  # what no row has takes no room
    for row, values in enumerate(batch.to_pylist()):
        block, place = index.at(row)
        assert block.read["caption"](place) == values["caption"] == f"row {row}"
        (given,) = values["images"]
        assert block.read["images"](place) == ((None, None, given["offset"], given["size"]),)
    with pytest.raises(IndexError):
        index.at(5)


def test_damage_is_told_before_anything_is_read(tmp_path):
    shards(tmp_path, [20, 20])
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2])
    found = source(tmp_path)
    (told,) = damage_report(Subset(Concatenated("both", [found]), 5, 0))
    assert told.startswith(f"web: 1 of {len(found)} samples are lost in 1 of 2 shards")
    assert "00001.tar" in told and "truncated shard" in told
    (tmp_path / "00001.tar").write_bytes(whole)
    assert damage_report(source(tmp_path)) == []
