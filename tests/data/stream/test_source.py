"""Streamed datasets: their length, their captions, and copies for what needs rows."""

from pathlib import Path

import pytest

from engine.config.schema import Config
from engine.data.sources import open_source
from engine.data.stream.source import WHOLE_SHARD, copy_shards, row_of
from engine.errors import UserError
from engine.train.plan import make_plan
from tests.data.stream.shard_server import serve, source, write_shards


def test_length_is_given_stated_or_counted_once(tmp_path, capsys):
    paths = write_shards(tmp_path / "shards", [3, 4])
    cache = tmp_path / "cache"
    assert len(source(paths, cache, length=99)) == 99
    with serve(tmp_path / "shards") as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        assert len(source(urls, cache)) == 7
        assert "counting the samples of 2 shards" in capsys.readouterr().out
        asked = len(server.requests)
        assert len(source(urls, cache)) == 7
        assert len(server.requests) == asked
        for path, number in zip(paths, (30, 40), strict=True):
            stated = path.with_name(path.stem + "_stats.json")
            stated.write_text(f'{{"successes": {number}, "count": 100}}')
        assert len(source(urls, tmp_path / "other")) == 70
        assert not any(name.endswith(".tar") for name, _ in server.requests[asked:])


def test_a_shard_that_cannot_be_counted_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.open._FIRST_PAUSE", 0.001)
    with serve(tmp_path) as server, pytest.raises(UserError, match=r"missing: http.*/a\.tar"):
        len(source([f"{server.url}/a.tar"], tmp_path / "cache"))


def test_captions_are_streamed(tmp_path):
    paths = write_shards(tmp_path, [2, 2], bad=[1])
    streamed = source(paths, tmp_path)
    assert list(streamed.captions()) == ["row 0", "row 2", "row 3"]
    assert streamed.place(row_of(1, 3)) == f"{paths[1]}#3"
    assert streamed.place(row_of(1, WHOLE_SHARD)) == str(paths[1])


def test_streams_are_not_read_by_row_nor_mixed_with_rows(tmp_path):
    write_shards(tmp_path / "a", [2])
    write_shards(tmp_path / "b", [2])
    config = Config(data={
        "data_path": str(tmp_path), "batch_size": 2, "train_name": ["a", "b"],
        "datasets": {"a": {"format": "webdataset", "stream": True}, "b": {"format": "webdataset"}},
    })  # fmt: skip
    with pytest.raises(UserError, match="'a' is streamed for training, and cannot be") as error:
        open_source("a", "train", config.data, key="data.train_name")
    assert error.value.key == "data.train_name"
    with pytest.raises(UserError, match=r"streamed datasets \(a\) beside others"):
        make_plan(config, 1)


def test_copies_are_made_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.open._FIRST_PAUSE", 0.001)
    paths = write_shards(tmp_path / "shards", [3, 4])
    with serve(tmp_path / "shards") as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        server.cuts["00001.tar"] = [5000]
        copies = copy_shards(urls, name="v", cache_dir=tmp_path / "cache")
        assert len(set(copies)) == 2
        for copy, path in zip(copies, paths, strict=True):
            assert Path(copy).read_bytes() == path.read_bytes()
        asked = len(server.requests)
        assert copy_shards(urls, name="v", cache_dir=tmp_path / "cache") == copies
        local = list(map(str, paths))
        assert copy_shards(local, name="v", cache_dir=tmp_path / "cache") == local
        assert len(server.requests) == asked
        with pytest.raises(UserError, match=r"dataset 'v': a shard cannot be copied: missing"):
            copy_shards([f"{server.url}/no.tar"], name="v", cache_dir=tmp_path / "cache")
