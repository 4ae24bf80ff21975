"""Tar shards as a dataset of the configuration."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import webdataset

from engine.config.schema import Config as Settings
from engine.config.schema import Data
from engine.data.formats.webdataset import Config, build
from engine.data.loader import train_batches
from engine.data.sources import open_source
from engine.data.stream.source import Stream
from engine.data.tables.source import TableSource
from engine.errors import UserError
from engine.train.plan import make_plan, order_key
from tests.data.formats.folders import image
from tests.data.tar.tar_files import pairs, picture, write_tar


def build_at(root, split="train", **options):
    config = Config(root=root, **options)
    return build(config, name="web", split=split, cache_dir=root / "cache")


def folder(root, train=(3, 3), valid=(2,)):
    first = 0
    for split, counts in (("train", train), ("valid", valid)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for number, count in enumerate(counts):
            write_tar(root / split / f"{number:05d}.tar", pairs(range(first, first + count)))
            first += count
    return root


def test_splits_lie_in_folders(tmp_path):
    folder(tmp_path)
    train, valid = build_at(tmp_path), build_at(tmp_path, "valid")
    assert (len(train), len(valid)) == (6, 2)
    assert train[0].key == "train/00000.tar/00000.jpg"
    assert valid[0].caption == "row 6"


def test_as_img2dataset_writes_it(tmp_path):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for number in range(3):
                key = f"{shard:05d}{number:04d}"
                fields = {"url": "http://x/y.jpg", "caption": key, "key": key, "status": "success"}
                data = picture(3 * shard + number)
                writer.write({"__key__": key, "jpg": data, "txt": key, "json": fields})
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": 3}))
    source = build_at(tmp_path)
    assert list(source.captions()) == [f"{s:05d}{n:04d}" for s in range(2) for n in range(3)]
    assert [image(source[index]) for index in range(6)] == [picture(index) for index in range(6)]


@pytest.mark.parametrize(
    "train", ["train/{00000..00001}.tar", ["train/00000.tar", "train/00001.tar"],
              "train/00000.tar::train/00001.tar", "train/*.tar"]
)  # fmt: skip
def test_shards_are_named_in_the_fields_ways(train, tmp_path):
    assert len(build_at(folder(tmp_path), train=train)) == 6


def test_a_mistake_is_told_at_its_option(tmp_path):
    folder(tmp_path)
    for options, split, key in (
        ({"train": "train/{0..3}.tar"}, "train", "data.datasets.web.train"),
        ({"valid": "other/*.tar"}, "valid", "data.datasets.web.valid"),
        ({"length": 7}, "train", "data.datasets.web.length"),
        ({"train": "pipe:cat x.tar"}, "train", "data.datasets.web.train"),
    ):
        with pytest.raises(UserError) as error:
            build_at(tmp_path, split, **options)
        assert error.value.key == key
    with pytest.raises(UserError, match="no folder"):
        build_at(tmp_path / "none")
    with pytest.raises(UserError, match="no file matches"):
        build_at(folder(tmp_path / "only", valid=()), "valid")


def test_length_may_be_given(tmp_path):
    assert len(build_at(folder(tmp_path), length=6)) == 6
    assert len(build_at(tmp_path, "valid", length=6)) == 2  # it is about training


def test_local_shards_are_streamed_where_asked(tmp_path):
    folder(tmp_path)
    train = build_at(tmp_path, stream=True)
    assert isinstance(train, Stream)
    assert [item.key for item in train.read(0)] == ["00000", "00001", "00002"]
    assert isinstance(build_at(tmp_path), TableSource)


def test_by_name_in_a_configuration(tmp_path):
    folder(tmp_path / "mine")
    data = Data(
        data_path=str(tmp_path), datasets={"mine": {"format": "webdataset", "captions": "all"}}
    )
    assert len(open_source("mine", "train", data, key="data.train_name")) == 6


def settings(tmp_path, **options):
    given = {"train_name": ["mine"], "batch_size": 4, **options}
    datasets = {"mine": {"format": "webdataset"}}
    return Settings(data=Data(data_path=str(tmp_path), datasets=datasets, **given))


def test_a_plan_reads_a_window_of_shards_at_a_time(tmp_path):
    folder(tmp_path / "mine", train=[4] * 10)
    config = settings(tmp_path, train_type="shards+window", window_shards=2)
    plan = make_plan(config, 1)
    rows = [plan.rows(step)[:, 1] for step in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(40))
    assert max(len(set((each // 4).tolist())) for each in rows) <= 2
    other = make_plan(settings(tmp_path, train_type="shards+window", window_shards=3), 1)
    assert order_key(config, plan) != order_key(config, other)
    whole = make_plan(settings(tmp_path), 1)
    assert order_key(settings(tmp_path), whole)["data.window_shards and shards"] is None


def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path):
    folder(tmp_path / "mine")
    plan = make_plan(settings(tmp_path, batch_size=3), 1)

    def batches(num_workers):
        return [
            (step, batch)
            for step, batch, _ in train_batches(
                plan.sources,
                plan.sampler,
                lambda image: image.size,
                lambda samples: {"text": [s.row.caption for s in samples], "n": len(samples)},
                first_step=0,
                total_steps=4,
                steps_per_epoch=plan.steps_per_epoch,
                rank=0,
                world=1,
                seed=0,
                num_workers=num_workers,
            )
        ]

    assert batches(0) == batches(2)


def test_nothing_of_a_hostile_shard_is_run_or_written(tmp_path):
    """Members that webdataset's own decoder would unpickle or run are never looked at."""
    (tmp_path / "train").mkdir()
    ran = tmp_path / "ran"
    code = f"c__builtin__\nexec\n(S'open({str(ran)!r}, \"w\")'\ntR."
    members = [*pairs([0]), ("00000.pyd", code.encode()), ("00000.pickle", code.encode())]
    write_tar(tmp_path / "train" / "0.tar", [*members, ("../escaped.txt", b"x")])
    script = (
        "import sys; from pathlib import Path; from engine.data.formats.webdataset import *;"
        "s = build(Config(root=Path(sys.argv[1])), name='x', split='train',"
        "cache_dir=Path(sys.argv[1]) / 'cache'); print(len(s), s[0].caption)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    assert told.stdout.split(maxsplit=1) == ["2", "row 0\n"]
    assert not ran.exists()
    assert sorted(os.listdir(tmp_path)) == ["train"]  # noqa: PTH208
