"""Small shards, and a server on this machine that hands them out, well or badly."""

import http.server
import io
import tarfile
import threading
from contextlib import contextmanager

import numpy as np
from PIL import Image

from engine.data.stream.source import Stream
from engine.data.tar.texts import TextForm


def picture(number, size=(20, 16)):
    """A JPEG of noise that is a function of its number."""
    noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(noise).save(image, "JPEG")
    return image.getvalue()


def write_shard(path, numbers, bad=()):
    """Pairs named by their numbers; those of ``bad`` lack their text."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            members = {"jpg": picture(number), "txt": f"row {number}".encode()}
            if number in bad:
                members.pop("txt")
            for extension, data in members.items():
                header = tarfile.TarInfo(f"{number:05d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def write_shards(folder, sizes, bad=()):
    """Shards of so many consecutive numbers each, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    first, paths = 0, []
    for shard, size in enumerate(sizes):
        paths.append(write_shard(folder / f"{shard:05d}.tar", range(first, first + size), bad))
        first += size
    return paths


def source(urls, tmp_path, window=8, name="s", length=None):
    return Stream(name, list(map(str, urls)), TextForm(), window, tmp_path, length)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Breaks off where its server's ``cut`` says; knows ranges if its ``ranges`` says so."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        name = self.path.lstrip("/")
        if name in server.status:
            self.send_error(server.status[name])
            return
        try:
            data = (server.folder / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        start = self.headers.get("Range")
        first = int(start.removeprefix("bytes=").rstrip("-")) if start and server.ranges else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        cuts = server.cuts.get(name, [])
        end = cuts.pop(0) if cuts else len(data)
        self.wfile.write(data[first : max(first, end)])

    def log_message(self, *_):
        pass


@contextmanager
def serve(folder, ranges=True):
    """A server with ``url``, ``requests``, ``cuts`` (name: bytes after which to break off, one for
    each answer) and ``status`` (name: an HTTP error)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.folder, server.ranges = folder, ranges
    server.requests, server.cuts, server.status = [], {}, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
