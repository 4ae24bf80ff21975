"""The bytes of a shard that is stored elsewhere, read from front to end over unsafe connections.

``http(s)://`` is read by the standard library, ``pipe:COMMAND`` from a process without a shell,
every other scheme (``s3://``, ``gs://``, …) by fsspec. fsspec's own HTTP needs aiohttp, asks for
the size first, and neither continues where a server knows no ranges nor notices an early end.
"""

import functools
import http.client
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
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
_which = functools.cache(shutil.which)


def check_urls(urls: list[str], *, allow_pipe: bool, key: str | None) -> None:
    """Raises UserError for commands without opt-in, and for what this machine cannot read."""
    schemes: set[str] = set()
    for url in urls:
        if url.startswith(_PIPE):
            if problem := _problem_of_command(url, allow_pipe):
                raise UserError(problem, key=key)
        elif is_remote(url):
            schemes.add(url.split("://")[0].lower())
    for scheme in sorted(schemes - {"http", "https"}):
        import fsspec

        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:  # its text names the package to install
            raise UserError(
                f"shards at {scheme}:// cannot be read here: {error}", key=key
            ) from error


def _problem_of_command(url: str, allow_pipe: bool) -> str | None:
    if not allow_pipe:
        return (
            f"the shard {url!r} would run a command on this machine; "
            "if you trust it, set allow_pipe: true for this dataset"
        )
    try:
        words = shlex.split(url.removeprefix(_PIPE))
    except ValueError as error:
        return f"the command of the shard {url!r} is broken: {error}"
    if shell := sorted(_SHELL_WORDS.intersection(words)):
        return (
            f"the command of the shard {url!r} has {shell[0]!r}, but runs without a shell; "
            "put it into a script, and name that"
        )
    if not words or not _which(words[0]):
        return f"the program of the shard {url!r} is not installed"
    return None


class _PermanentError(OSError):
    """A refusal that a further try would meet again."""


class _Command:
    """What a command writes; its failure is an OSError with its last line."""

    def __init__(self, url: str) -> None:
        self._words = shlex.split(url.removeprefix(_PIPE))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if not data and (code := self._process.wait()):
            self._errors.seek(0)
            last = self._errors.read().decode("utf8", "replace").strip().splitlines()[-1:]
            raise OSError(f"{self._words[0]} ended with exit code {code}: {''.join(last)}")
        return data

    def close(self) -> None:
        with self._process, self._errors:  # closes its output, waits for it
            if self._process.poll() is None:  # the rest of its output is not wanted
                self._process.kill()


_Connection = BinaryIO | http.client.HTTPResponse | _Command


def _connect(url: str, offset: int) -> tuple[_Connection, int]:
    """A connection that reads from ``offset`` on, else from the beginning, and where it reads."""
    if url.startswith(_PIPE):
        return _Command(url), 0
    if url.lower().startswith(("http://", "https://")):
        return _connect_http(url, offset)
    if is_remote(url):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
        file: BinaryIO = filesystem.open(path, "rb")
    else:
        file = Path(url).open("rb")  # noqa: SIM115 (its user closes it)
    file.seek(offset)
    return file, offset


def _connect_http(url: str, offset: int) -> tuple[http.client.HTTPResponse, int]:
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        text = f"HTTP {error.code} {error.reason}"
        if error.code in (404, 410):
            raise FileNotFoundError(text) from None
        permanent = error.code < 500 and error.code not in (408, 429)
        raise (_PermanentError if permanent else OSError)(text) from None
    # A server without ranges begins anew.
    return response, offset if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0


class Shard(AbstractContextManager["Shard"]):
    """The bytes, in order, of a URL that ``check_urls`` has accepted; connects when first read.

    A broken connection is made again where it broke. Raises BadSample ``missing`` where there is
    no such shard, ``unreadable`` after the last try.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._from: _Connection | None = None
        self._offset = self._broke_at = 0
        self._failures = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end alone."""
        while True:
            try:
                data = self._read(size)
            except FileNotFoundError as error:
                raise BadSample("missing", f"{self.url}: {error}") from error
            except (OSError, http.client.HTTPException, EOFError) as error:
                self._failed(error)
            else:
                self._offset += len(data)
                if self._offset > self._broke_at:
                    self._failures = 0
                return data

    def _read(self, size: int) -> bytes:
        if self._from is None:
            self._from, at = _connect(self.url, self._offset)
            while left := self._offset - at:
                at += len(data := self._from.read(min(left, _CHUNK)))
                if not data:
                    raise OSError(f"it ends {left:,} bytes earlier than before")
        data = self._from.read(size)
        if not data and isinstance(self._from, http.client.HTTPResponse) and self._from.length:
            raise OSError(f"connection closed {self._from.length:,} bytes before the end")
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

    def __exit__(self, *_: object) -> None:
        self.close()
