"""Tar shards: reading samples by index beside webdataset's reader, indexing beside ``tar t``.

    python -m tests.bench tar [--threads N]

A shard as img2dataset writes it (webdataset's own writer: 256-pixel photographs, text, JSON), in
the page cache. Images are handed out encoded; nothing is decoded on either side.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import webdataset

from engine.data.tables.table import Table
from engine.data.tar.index import write_index
from engine.data.tar.shards import open_shards
from engine.data.tar.texts import TextForm
from engine.types import Source
from tests.bench.table import Line, Options
from tests.bench.timing import summaries
from tests.data.formats.folders import image


def write_shard(path: Path, samples: int) -> None:
    """Images of 15 to 40 kB of noise with what img2dataset records of a download."""
    generator = random.Random(0)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(samples):
            key, caption = f"{number:09d}", f"a photograph of thing {number} beside another thing"
            fields = {
                "url": f"https://images.example.org/some/folder/{number}.jpg",
                "caption": caption,
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 192,
                "original_width": 1024,
                "original_height": 768,
                "exif": "{}",
                "sha256": f"{number:064x}",
            }
            image = b"\xff\xd8" + generator.randbytes(generator.randrange(15_000, 40_000))
            writer.write({"__key__": key, "jpg": image, "txt": caption, "json": fields})


def by_webdataset(path: Path) -> list[tuple[bytes, str]]:
    """All images and captions through webdataset's reader."""
    samples = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(sample["jpg"], sample["txt"].decode()) for sample in samples]


def by_index(source: Source) -> list[tuple[bytes, str]]:
    """The same through the index."""
    records = (source[index] for index in range(len(source)))
    return [(image(record), record.caption) for record in records]  # type: ignore[misc]


def places(index: Table, path: Path) -> list[bytes]:
    """The least that reading images takes: one call for each, at places that are known."""
    images = [image for (image,) in index.values("images")]
    offsets, sizes = ([image[name] for image in images] for name in ("offset", "size"))
    with path.open("rb") as file:
        return [os.pread(file.fileno(), n, at) for at, n in zip(offsets, sizes, strict=True)]


def rows(options: Options) -> Iterator[Line]:
    """Samples a second read, and shards' members a second indexed."""
    samples = 40 if options.quick else 5000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = root / "00000.tar"
        write_shard(path, samples)
        source = open_shards(
            [str(path)], name="bench", split="train", root=root, cache_dir=root / "cache"
        )
        assert by_index(source) == by_webdataset(path)
        index = root / "index"
        write_index(path, index, TextForm())
        yield _reading(path, source, Table(index), options)
        yield _indexing(path, index, options)


def _reading(path: Path, source: Source, index: Table, options: Options) -> Line:
    found = summaries(
        {
            "ours": lambda: by_index(source),
            "peer": lambda: by_webdataset(path),
            "limit": lambda: places(index, path),
        },
        1 if options.quick else options.repeats,
        time.perf_counter,
    )
    speed = {name: len(source) / max(timing.seconds, 1e-9) for name, timing in found.items()}
    return Line(
        "samples read, ÷ webdataset",
        speed["ours"], speed["peer"], speed["limit"],
        ratio=speed["ours"] / speed["peer"],
        spread=max(found[name].spread for name in ("ours", "peer")),
        mark="≥ 5", unit="/s",
    )  # fmt: skip


def _indexing(path: Path, target: Path, options: Options) -> Line:
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    members = len(listed.stdout.split())
    assert members == 3 * len(Table(target))

    def tar() -> None:
        subprocess.run(["tar", "tf", path], stdout=subprocess.DEVNULL, check=True)

    found = summaries(
        {"ours": lambda: write_index(path, target, TextForm()), "tar": tar},
        1 if options.quick else options.repeats,
        time.perf_counter,
    )
    speed = {name: members / max(timing.seconds, 1e-9) for name, timing in found.items()}
    return Line(
        "members indexed, ÷ tar t",
        speed["ours"], speed["tar"],
        ratio=speed["ours"] / speed["tar"],
        spread=max(timing.spread for timing in found.values()),
        mark="≥ 0.5", unit="/s",
    )  # fmt: skip
