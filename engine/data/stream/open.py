"""The bytes of a shard that is stored elsewhere, read from front to end over unsafe connections.

``http(s)://`` is read by the standard library, ``pipe:COMMAND`` from a process without a shell,
every other scheme (``s3://``, ``gs://``, …) by fsspec. fsspec's own HTTP needs aiohttp, asks for
the size first, and neither continues where a server knows no ranges nor notices an early end.
"""

from __future__ import annotations

import http.client
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from engine.data.tar.urls import is_remote
from engine.errors import UserError
from engine.types import BadSample

_TRIES = 6  # connections without a further byte before a shard is given up
_FIRST_PAUSE = 0.1  # seconds before the second try; doubled for each further one
_TIMEOUT = 60.0  # seconds that a connection may be silent
_CHUNK = 1 << 16  # bytes read at once where they are skipped
_SHELL_WORDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}
_PIPE = "pipe:"


class Shard:
    """A shard's bytes in order; a broken connection is made again where it broke off.

    Raises BadSample ``missing`` where there is none, ``unreadable`` after the last try.
    """

    def __init__(self, url: str, connect: Callable[[int], _FromStart | BinaryIO]) -> None:
        self.url, self._connect = url, connect
        self._from: _FromStart | BinaryIO | None = None
        self._offset = self._broke_at = 0
        self._failures = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end alone."""
        while True:
            try:
                if self._from is None:
                    self._from = self._connect(self._offset)
                data = self._from.read(size)
            except FileNotFoundError as error:
                raise BadSample("missing", f"{self.url}: {error}") from error
            except (OSError, http.client.HTTPException, EOFError) as error:
                self._failed(error)
            else:
                self._offset += len(data)
                if self._offset > self._broke_at:
                    self._failures = 0
                return data

    def _failed(self, error: Exception) -> None:
        self.close()
        self._failures, self._broke_at = self._failures + 1, self._offset
        if self._failures == _TRIES or isinstance(error, _PermanentError):
            text = str(error) or type(error).__name__
            raise BadSample(
                "unreadable", f"{self.url}: {text} at byte {self._offset:,} (try {self._failures})"
            ) from error
        time.sleep(_FIRST_PAUSE * 2 ** (self._failures - 1))

    def close(self) -> None:
        """Let go of the connection; a further read makes a new one."""
        if self._from is not None:
            self._from.close()
            self._from = None

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_shard(url: str) -> Shard:
    """A reader of ``url``, which ``check_urls`` has accepted. Connects when first read."""
    connect: Callable[[str, int], _FromStart | BinaryIO] = _by_fsspec
    if not is_remote(url):
        connect = _local
    elif url.startswith(_PIPE):
        connect = _Command
    elif url.lower().startswith(("http://", "https://")):
        connect = _Response
    return Shard(url, partial(connect, url))


def check_urls(urls: list[str], *, allow_pipe: bool, key: str | None) -> None:
    """Raises UserError for commands without opt-in, and for what this machine cannot read."""
    programs: set[str] = set()  # found to be there
    schemes: set[str] = set()
    for url in urls:
        if url.startswith(_PIPE):
            _check_command(url, allow_pipe, programs, key)
        elif is_remote(url):
            schemes.add(url.split("://")[0].lower())
    for scheme in sorted(schemes - {"http", "https"}):
        _check_scheme(scheme, key)


def _check_command(url: str, allow_pipe: bool, programs: set[str], key: str | None) -> None:
    if not allow_pipe:
        raise UserError(
            f"the shard {url!r} would run a command on this machine; "
            "if you trust it, set allow_pipe: true for this dataset",
            key=key,
        )
    try:
        words = shlex.split(url.removeprefix(_PIPE))
    except ValueError as error:
        raise UserError(f"the command of the shard {url!r} is broken: {error}", key=key) from None
    if shell := sorted(_SHELL_WORDS.intersection(words)):
        raise UserError(
            f"the command of the shard {url!r} has {shell[0]!r}, but runs without a shell; "
            "put it into a script, and name that",
            key=key,
        )
    if words and words[0] not in programs and shutil.which(words[0]):
        programs.add(words[0])
    if not words or words[0] not in programs:
        raise UserError(f"the program of the shard {url!r} is not installed", key=key)


def _check_scheme(scheme: str, key: str | None) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # its text names the package to install
        raise UserError(f"shards at {scheme}:// cannot be read here: {error}", key=key) from error
    except ValueError as error:
        raise UserError(
            f"shards at {scheme}:// cannot be read: fsspec knows no such scheme", key=key
        ) from error


def _local(url: str, offset: int) -> BinaryIO:
    file = Path(url).open("rb")  # noqa: SIM115 (its user closes it)
    file.seek(offset)
    return file


def _by_fsspec(url: str, offset: int) -> BinaryIO:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    file: BinaryIO = filesystem.open(path, "rb")
    file.seek(offset)
    return file


class _FromStart(ABC):
    """What can be read from its first byte on alone."""

    @abstractmethod
    def read(self, size: int, /) -> bytes: ...

    @abstractmethod
    def close(self) -> None: ...

    def skip(self, count: int) -> None:
        """Read over ``count`` bytes; closes, and raises OSError, where they are not there."""
        try:
            while count:
                data = self.read(min(count, _CHUNK))
                if not data:
                    raise OSError(f"it ends {count:,} bytes earlier than before")
                count -= len(data)
        except BaseException:
            self.close()
            raise


class _Response(_FromStart):
    """A GET from ``offset`` on, which notices an end before the announced length."""

    def __init__(self, url: str, offset: int) -> None:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        request = urllib.request.Request(url, headers=headers)
        try:
            self._response = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        length = self._response.headers.get("Content-Length")
        self._left = int(length) if length and length.isdigit() else None
        if offset and self._response.status != http.HTTPStatus.PARTIAL_CONTENT:
            self.skip(offset)  # a server without ranges begins anew

    def read(self, size: int) -> bytes:
        data: bytes = self._response.read(size)
        if self._left is not None:
            self._left -= len(data)
            if not data and self._left > 0:
                raise OSError(f"connection closed {self._left:,} bytes before the end")
        return data

    def close(self) -> None:
        self._response.close()


def _refusal(error: urllib.error.HTTPError) -> OSError:
    text = f"HTTP {error.code} {error.reason}"
    if error.code in (404, 410):
        return FileNotFoundError(text)
    permanent = error.code < 500 and error.code not in (408, 429)
    return _PermanentError(text) if permanent else OSError(text)


class _PermanentError(OSError):
    """A refusal that a further try would meet again."""


class _Command(_FromStart):
    """What a command writes, from ``offset`` on; its failure is an OSError with its last line."""

    def __init__(self, url: str, offset: int) -> None:
        self._words = shlex.split(url.removeprefix(_PIPE))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.skip(offset)

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if not data and (code := self._process.wait()):
            self._errors.seek(0)
            last = self._errors.read().decode("utf8", "replace").strip().splitlines()[-1:]
            raise OSError(f"{self._words[0]} ended with exit code {code}: {''.join(last)}")
        return data

    def close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._process.poll() is None:  # the rest of its output is not wanted
            self._process.kill()
        self._process.wait()
        self._errors.close()
