"""Shards that lie elsewhere: whole over broken connections, refused or named otherwise."""

import shlex
import sys

import pytest

from engine.data.stream import open as stream_open
from engine.data.stream.open import Shard, check_urls
from engine.errors import UserError
from engine.types import BadSample
from tests.data.stream.shard_server import serve


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(stream_open, "_FIRST_PAUSE", 0.001)


def content(url):
    found = b""
    with Shard(url) as shard:
        while data := shard.read(7000):
            found += data
    return found


def python(text):
    return f"pipe:{shlex.quote(sys.executable)} -c {shlex.quote(text)}"


DATA = bytes(range(256)) * 400


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    return tmp_path


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_made_again_where_it_broke(folder, ranges):
    with serve(folder, ranges) as server:
        server.cuts["a.tar"] = [30_000, 60_000]
        assert content(f"{server.url}/a.tar") == DATA
        assert len(server.requests) == 3
        assert all(start for _, start in server.requests[1:])


def test_a_connection_may_break_often_as_long_as_it_brings_something(folder):
    with serve(folder) as server:
        server.cuts["a.tar"] = list(range(5000, len(DATA), 5000))
        assert content(f"{server.url}/a.tar") == DATA
        assert len(server.requests) == 21


def test_tries_are_bounded(folder):
    with serve(folder) as server:
        server.cuts["a.tar"] = [30_000] * 100
        with pytest.raises(BadSample, match=r"unreadable: http://.*72,400 bytes before the end"):
            content(f"{server.url}/a.tar")
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("status", "cause", "requests"),
    [(404, "missing", 1), (403, "unreadable", 1), (503, "unreadable", 6)],
)
def test_a_refusal_is_told_and_tried_again_where_that_may_help(folder, status, cause, requests):
    with serve(folder) as server:
        server.status["a.tar"] = status
        with pytest.raises(BadSample, match=f"{status}") as told:
            content(f"{server.url}/a.tar")
        assert told.value.cause == cause
        assert len(server.requests) == requests


def test_no_server_is_unreadable():
    with pytest.raises(BadSample, match=r"unreadable: http://127\.0\.0\.1:9/a\.tar"):
        content("http://127.0.0.1:9/a.tar")


def test_a_command_gives_its_output_without_a_shell(folder):
    assert content(f"pipe:cat {folder / 'a.tar'}") == DATA
    name = folder / "two words; echo.tar"
    name.write_bytes(b"x" * 10)
    assert content(f"pipe:cat {shlex.quote(str(name))}") == b"x" * 10


def test_a_failing_command_is_named_with_its_last_words():
    url = python("import sys; print('a' * 5000, flush=True); sys.exit('no such bucket')")
    with pytest.raises(BadSample, match=r"unreadable: .* ended with exit code 1: no such bucket"):
        content(url)


def test_a_command_that_works_the_second_time_is_read_on(tmp_path):
    mark = tmp_path / "mark"
    url = python(
        f"import pathlib, sys; p = pathlib.Path({str(mark)!r}); "
        "first = not p.exists(); p.touch(); "
        "print('b' * (9000 if first else 20000), end='', flush=True); sys.exit(3 if first else 0)"
    )
    assert content(url) == b"b" * 20_000


def test_a_command_is_ended_with_its_reader():
    with Shard(python("while True: print('c' * 1000)")) as shard:
        assert shard.read(10) == b"cccccccccc"
        process = shard._from._process
    assert process.returncode is not None


@pytest.mark.parametrize(
    ("url", "allow", "told"),
    [
        ("pipe:cat a.tar", False, "allow_pipe: true"),
        ("pipe:cat a.tar | gunzip", True, r"has '\|', but runs without a shell"),
        ("pipe:cat 'a.tar", True, "is broken: No closing quotation"),
        ("pipe:no-such-program a.tar", True, "is not installed"),
        ("pipe:", True, "is not installed"),
        ("nonsense://bucket/a.tar", False, "shards at nonsense:// cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_run(url, allow, told):
    with pytest.raises(UserError, match=told) as error:
        check_urls(["http://host/fine.tar", url], allow_pipe=allow, key="data.datasets.x.urls")
    assert error.value.key == "data.datasets.x.urls"


def test_a_missing_package_is_named(monkeypatch):
    def missing(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UserError, match="s3:// cannot be read here: Install s3fs"):
        check_urls(["s3://bucket/a.tar"], allow_pipe=False, key=None)


def test_other_schemes_go_through_fsspec(folder):
    import fsspec

    with fsspec.open("memory://shards/a.tar", "wb") as file:
        file.write(DATA)
    check_urls(["memory://shards/a.tar"], allow_pipe=False, key=None)
    assert content("memory://shards/a.tar") == DATA
    with pytest.raises(BadSample, match=r"missing: memory://shards/b\.tar"):
        content("memory://shards/b.tar")
