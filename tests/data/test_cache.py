"""Things made once by one of many processes."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from engine.data.cache import build_cached, cached_file


def _make_slowly(target: Path, log: Path, start) -> None:
    def make(path: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        path.mkdir()
        for i in range(20):
            (path / f"{i}").write_text("x" * 1000)

    start.wait()
    build_cached(target, make)
    assert len(list(target.iterdir())) == 20


def _die_halfway(target: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    build_cached(target, make)


def test_one_process_makes_while_others_wait(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    target, log = tmp_path / "deep" / "made", tmp_path / "log"
    arguments = (target, log, start)
    processes = [context.Process(target=_make_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "made\n"


def test_killed_maker_leaves_nothing_that_counts(tmp_path):
    target = tmp_path / "made"
    process = multiprocessing.get_context("spawn").Process(target=_die_halfway, args=(target,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()
    build_cached(target, lambda path: path.write_text("whole") and None)
    assert target.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir() if "making" in p.name] == []


def test_failed_maker_leaves_nothing(tmp_path):
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cached(tmp_path / "made", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".made.lock"]


def test_what_is_there_is_not_made_again(tmp_path):
    (tmp_path / "made").write_text("old")
    build_cached(tmp_path / "made", lambda path: pytest.fail("made again"))


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
