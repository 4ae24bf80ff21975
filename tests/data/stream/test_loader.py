"""Batches of streamed shards: whole, disjoint over ranks, and the same after a stop."""

import itertools
import json
from collections import Counter

import pytest
import torch

from engine.data.reader import Limits
from engine.data.stream import loader as stream_loader
from engine.data.stream.loader import StreamLoader
from engine.errors import FaultError, UserError
from tests import distributed
from tests.data.drawn_source import collate, noisy
from tests.data.stream.shard_server import serve, source, write_shards

SIZES = (7, 5, 9, 6, 8, 5, 7, 9)  # 56 samples


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", SIZES)


def loader(shards, tmp_path, world=1, rank=0, workers=0, sources=None, **options):
    settings = {
        "batch_size": 4,
        "first_step": 0,
        "total_steps": 30,
        "rank": rank,
        "world": world,
        "seed": 3,
        "limits": Limits(max_pixels=10**6),
        "num_workers": workers,
        **options,
    }
    sources = sources or [source(shards, tmp_path, length=56)]
    return StreamLoader(sources, noisy, collate, **settings)


def texts(found):
    return [text for _, batch, _ in found for text in batch["text_B"]]


def take(streamed, count):
    """The first batches, and the state after them."""
    batches = iter(streamed)
    found = list(itertools.islice(batches, count))
    state = streamed.state()
    batches.close()
    return found, state


def same(one, other):
    assert [step for step, *_ in one] == [step for step, *_ in other]
    for (_, a, bad_a), (_, b, bad_b) in zip(one, other, strict=True):
        assert bad_a == bad_b
        assert a.keys() == b.keys()
        for name, value in a.items():
            equal = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else None
            assert equal if equal is not None else value == b[name]


@pytest.mark.parametrize(("workers", "stop"), [(0, 5), (0, 17), (1, 9), (2, 1), (2, 8), (3, 13)])
def test_a_resume_at_the_same_world_is_exact(shards, tmp_path, workers, stop):
    whole = list(loader(shards, tmp_path, workers=workers))
    first, state = take(loader(shards, tmp_path, workers=workers), stop)
    assert json.loads(json.dumps(state)) == state
    again = loader(shards, tmp_path, workers=workers, saved=[state], first_step=stop)
    assert "resumed exactly" in again.greeting
    same(whole, first + list(again))


def test_a_second_resume_is_exact_too(shards, tmp_path):
    whole = list(loader(shards, tmp_path, workers=2))
    found, state, stop = [], None, 0
    for count in (3, 4, 5, 18):
        saved = [state] if state else None
        part, state = take(loader(shards, tmp_path, workers=2, saved=saved, first_step=stop), count)
        stop += count
        found += part
    same(whole, found)


def test_the_stream_leaves_the_callers_randomness_alone(shards, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    take(loader(shards, tmp_path), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0)])
def test_ranks_and_workers_share_a_pass(tmp_path, world, workers):
    """With shards of one size, the batches of a pass are each sample once."""
    shards = write_shards(tmp_path / "even", [8] * 8)
    found = []
    for rank in range(world):
        streamed = loader(shards, tmp_path, world, rank, workers, total_steps=16 // world)
        found += texts(streamed)
    assert sorted(found) == sorted(f"row {n}" for n in range(64))


def test_readers_that_run_dry_go_on_with_the_next_pass(tmp_path):
    shards = write_shards(tmp_path / "uneven", [2, 30])
    found = [texts(loader(shards, tmp_path, 2, rank, total_steps=8)) for rank in range(2)]
    assert [len(mine) for mine in found] == [32, 32]
    counts = Counter(found[0] + found[1])
    assert len(counts) == 32
    assert max(counts.values()) > 1


BEFORE_AND_AFTER = [((1, 0), (2, 0)), ((2, 1), (1, 1)), ((1, 2), (1, 3)), ((2, 0), (2, 2))]


@pytest.mark.parametrize(("before", "after"), BEFORE_AND_AFTER)
def test_a_resume_at_another_world_loses_nothing(shards, tmp_path, before, after):
    (world, workers), seen, states, stop = before, [], [], 4
    for rank in range(world):
        found, state = take(loader(shards, tmp_path, world, rank, workers), stop)
        seen += texts(found)
        states.append(state)
    world, workers = after
    for rank in range(world):
        again = loader(shards, tmp_path, world, rank, workers, saved=states, first_step=stop)
        assert "resumed at least once" in again.greeting
        assert f"{before[0]} × {before[1]} before" in again.greeting
        found, _ = take(again, 14)
        assert [step for step, *_ in found] == list(range(stop, stop + 14))
        seen += texts(found)
    assert set(seen) == {f"row {n}" for n in range(56)}


def test_finished_shards_do_not_come_again(tmp_path):
    """Half a pass on one process, the other half on two: no sample twice but of one shard."""
    shards = write_shards(tmp_path / "even", [8] * 8)
    first, state = take(loader(shards, tmp_path), 8)
    again = [
        loader(shards, tmp_path, 2, rank, saved=[state], first_step=8, total_steps=12)
        for rank in range(2)
    ]
    second = [text for streamed in again for text in texts(streamed)]
    assert len(set(texts(first)) & set(second)) <= 8
    assert len(set(texts(first)) | set(second)) >= 56


def test_as_many_workers_as_before_where_none_are_named(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_loader, "default_workers", lambda world: 2)
    _, state = take(loader(shards, tmp_path, workers=None), 3)
    assert state["workers"] == 2
    monkeypatch.setattr(stream_loader, "default_workers", lambda world: 1)
    again = loader(shards, tmp_path, workers=None, saved=[state], first_step=3)
    assert "resumed exactly" in again.greeting


def test_too_few_shards_for_the_readers_are_told(shards, tmp_path, monkeypatch):
    told = r"8 streamed shards are too few for 2 processes with data\.num_workers 5.* at most 4"
    with pytest.raises(UserError, match=told):
        loader(shards, tmp_path, world=2, workers=5)
    with pytest.raises(UserError, match=r"too few for 9 processes: .*start at most 8"):
        loader(shards, tmp_path, world=9)
    monkeypatch.setattr(stream_loader, "default_workers", lambda world: 6)
    assert loader(shards, tmp_path, world=2, workers=None).state()["workers"] == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_told_and_the_next_ones_taken(tmp_path, workers):
    shards = write_shards(tmp_path / "bad", [8] * 4, bad=(3, 20))
    torn = shards[2].read_bytes()
    shards[2].write_bytes(torn[: len(torn) * 3 // 4])
    found = list(loader(shards, tmp_path, workers=workers, total_steps=14))
    assert all(len(batch["text_B"]) == 4 for _, batch, _ in found)
    bad = {record.key: record for _, _, records in found for record in records}
    causes = {key.removeprefix(str(tmp_path)): record.cause for key, record in bad.items()}
    assert causes == {
        "/bad/00000.tar#3 00003": "no caption",
        "/bad/00002.tar#4 00020": "no caption",
        "/bad/00002.tar": "truncated shard",
    }
    assert len({record.index for record in bad.values()}) == 3


def test_a_dataset_of_bad_samples_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.loader._MAX_BAD", 10)
    shards = write_shards(tmp_path / "bad", [8], bad=range(8))
    with pytest.raises(FaultError, match=r"none of 10 samples in a row.*10 no caption"):
        list(loader(shards, tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_workers_keep_their_words(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("engine.data.stream.open._FIRST_PAUSE", 0.001)
    gone = [tmp_path / "gone.tar"]
    with pytest.raises(
        FaultError, match=r"none of a reader's 1 shards has a sample: missing.*gone"
    ):
        list(loader(gone, tmp_path, workers=workers))


def test_several_datasets_are_one_pool(tmp_path):
    sources = [
        source(write_shards(tmp_path / name, [6] * 2), tmp_path, name=name, length=12)
        for name in ("a", "b")
    ]
    found = list(loader(None, tmp_path, sources=sources, total_steps=6))
    rows = [tuple(row) for _, batch, _ in found for row in batch["row_B2"].tolist()]
    assert sorted((dataset, row >> 32) for dataset, row in rows) == sorted(
        (dataset, shard) for dataset in range(2) for shard in range(2) for _ in range(6)
    )
    seeds = [seed for _, batch, _ in found for seed in batch["seed_B"]]
    assert len(set(seeds)) == 24


def test_breaks_on_the_way_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.open._FIRST_PAUSE", 0.001)
    shards = write_shards(tmp_path / "shards", [8] * 4)
    with serve(tmp_path / "shards") as server:
        urls = [f"{server.url}/{path.name}" for path in shards]
        calm = list(loader(urls, tmp_path))
        server.cuts = {path.name: [2000, 9000, 9100] for path in shards}
        same(calm, list(loader(urls, tmp_path)))
        assert any(start for _, start in server.requests)
        server.status["00001.tar"] = 500  # for good: the shard is told, the others are read
        found = list(loader(urls, tmp_path))
    bad = [record for _, _, records in found for record in records]
    assert {record.cause for record in bad} == {"unreadable"}
    assert {record.key for record in bad} == {urls[1]}
    assert set(texts(found)) == {f"row {n}" for n in range(32) if n // 8 != 1}


def _rank_texts(folder):
    from pathlib import Path

    from engine.dist import collectives

    paths = sorted(Path(folder, "even").glob("*.tar"))
    streamed = loader(paths, Path(folder), collectives.world(), collectives.rank(), None,
                      total_steps=8)  # fmt: skip
    return texts(streamed)


def test_two_gloo_ranks_see_disjoint_samples(tmp_path):
    write_shards(tmp_path / "even", [8] * 8)
    one, two = distributed.run(_rank_texts, 2, str(tmp_path))
    assert len(one) == len(two) == 32
    assert len({*one, *two}) == 64
