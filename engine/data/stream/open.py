"""The bytes of a shard that lies elsewhere, read from front to end, over connections that break.

``http(s)://`` goes through the standard library, ``pipe:COMMAND`` through a process that no shell
has a part in, every other scheme (``s3://``, ``gs://``, …) through fsspec.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from engine.data.tar.urls import is_remote
from engine.errors import UserError
from engine.types import BadSample

_TRIES = 6  # connections without a further byte before a shard is given up
_FIRST_PAUSE = 0.1  # seconds before the second try; doubled for each further one
_TIMEOUT = 60.0  # seconds that a connection may be silent
_CHUNK = 1 << 16  # bytes read at once where they are passed over
_SHELL_WORDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>"}
_PIPE = "pipe:"


class _Connection(Protocol):
    """What a shard is read from: ``read`` raises OSError where the end came too early."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Shard:
    """A shard's bytes in order; a broken connection is made again where it broke off.

    Raises BadSample ``missing`` where there is none, ``unreadable`` after the last try.
    """

    def __init__(self, url: str, connect: Callable[[int], _Connection]) -> None:
        self.url, self._connect = url, connect
        self._from: _Connection | None = None
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
        if self._failures == _TRIES or getattr(error, "permanent", False):
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
    """A reader of ``url``, whose form ``check_urls`` has found fit. Connects when first read."""
    if not is_remote(url):
        return Shard(url, lambda offset: _local(url, offset))
    if url.startswith(_PIPE):
        return Shard(url, lambda offset: _Command(url, offset))
    if url.lower().startswith(("http://", "https://")):
        return Shard(url, lambda offset: _Response(url, offset))
    return Shard(url, lambda offset: _foreign(url, offset))


def check_urls(urls: list[str], *, allow_pipe: bool, key: str | None) -> None:
    """Raises UserError for commands without opt-in, and what this machine has no program for."""
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
        raise UserError(f"no program is there for the command of the shard {url!r}", key=key)


def _check_scheme(scheme: str, key: str | None) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # its text says which package is to be installed
        raise UserError(f"shards at {scheme}:// cannot be read here: {error}", key=key) from error
    except ValueError as error:
        raise UserError(f"no way of reading shards at {scheme}:// is known", key=key) from error


def _pass_over(stream: Any, count: int) -> None:
    while count:
        data = stream.read(min(count, _CHUNK))
        if not data:
            raise OSError(f"it ends {count:,} bytes earlier than before")
        count -= len(data)


def _local(url: str, offset: int) -> BinaryIO:
    file = Path(url).open("rb")  # noqa: SIM115 (its user closes it)
    file.seek(offset)
    return file


def _foreign(url: str, offset: int) -> Any:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    file = filesystem.open(path, "rb")
    file.seek(offset)
    return file


class _Response:
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
            self._skip(offset)  # a server without ranges begins anew

    def _skip(self, offset: int) -> None:
        try:
            _pass_over(self, offset)
        except BaseException:
            self.close()
            raise

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
    refused = OSError(text)
    refused.permanent = error.code < 500 and error.code not in (408, 429)  # type: ignore[attr-defined]
    return refused


class _Command:
    """What a command writes, from ``offset`` on; its failure is an OSError with its last words."""

    def __init__(self, url: str, offset: int) -> None:
        self._words = shlex.split(url.removeprefix(_PIPE))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        try:
            _pass_over(self, offset)
        except BaseException:
            self.close()
            raise

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if not data and (code := self._process.wait()):
            self._errors.seek(0)
            said = self._errors.read().decode("utf8", "replace").strip().splitlines()[-1:]
            raise OSError(f"{self._words[0]} ended with exit code {code}: {''.join(said)}")
        return data

    def close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._process.poll() is None:  # its output is not wanted to the end
            self._process.kill()
        self._process.wait()
        self._errors.close()
