"""Datasets with faults of twenty kinds planted in them, and with odd but sound images between."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

LONGEST = 400  # characters of a caption, to be set as data.max_caption_chars
LONG_CAPTION = "a very long caption " * 30


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def photograph(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC)


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def images(number: int) -> dict[str, tuple[bytes, str]]:
    """Kind → (bytes that are no image, the cause to be told)."""
    image = photograph(number)
    halves = {
        f"half a {form}": (encoded(image, form), "truncated")
        for form in ("JPEG", "PNG", "WEBP", "GIF")
    }
    jpeg = encoded(image, "JPEG")
    size = struct.pack(">BHH", 8, 40, 50)
    return {kind: (data[: len(data) // 2], cause) for kind, (data, cause) in halves.items()} | {
        "nothing": (b"", "empty file"),
        "words": (b"this is not an image at all", "not an image"),
        "a page": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        "a Photoshop file": (b"8BPS\0\1" + b"\0" * 60, "not an image"),
        "a PNG of which a chunk is spoilt": (_flipped(encoded(image, "PNG"), 60), "corrupt"),
        "a JPEG of zeros": (jpeg[:30] + bytes(len(jpeg) - 32) + jpeg[-2:], "corrupt"),
        "a bomb of a PNG": (png(20_000, 20_000), "too large"),
        "a bomb of a JPEG": (
            jpeg.replace(size, struct.pack(">BHH", 8, 65_000, 65_000)),
            "too large",
        ),
        "a strip": (encoded(Image.new("RGB", (60_000, 1)), "PNG"), "too large"),
    }


def odd(number: int) -> bytes:
    """An image that is unusual in one of many ways, and sound."""
    image = photograph(number)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.asarray(image.convert("L"))
    others = [image.rotate(90), image.rotate(180)]
    no_number = np.where(grey > 200, np.nan, grey / 255).astype(np.float32)
    ways = [
        lambda: encoded(image.convert("CMYK"), "JPEG"),
        lambda: encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        lambda: encoded(image.quantize(16), "PNG", transparency=0),
        lambda: encoded(image, "JPEG", exif=turned),
        lambda: encoded(image, "GIF", save_all=True, append_images=others),
        lambda: encoded(image, "WEBP", save_all=True, append_images=others),
        lambda: encoded(Image.fromarray(no_number), "TIFF"),
        lambda: encoded(image, "JPEG", progressive=True) + b"trailing bytes",
        lambda: encoded(image.convert("LA"), "PNG"),
        lambda: encoded(image.convert("1"), "BMP"),
    ]
    return ways[number % len(ways)]()


def places(number: int, faults: int) -> list[int]:
    """Rows to spoil, some of them neighbours, the first and the last among them."""
    inner = np.random.default_rng(0).choice(np.arange(1, number - 1), faults - 2, replace=False)
    return sorted([0, number - 1, *inner.tolist()])


CSV_KINDS = {
    "no file": "missing",
    "no name": "missing",
    "a link out of the folder": "outside root",
    "a folder": "unreadable",
    "a name that is too long": "unreadable",
    "no caption": "no caption",
    "a caption that is too long": "caption too long",
}
SHARD_KINDS = {
    "text alone": "missing image",
    "an image alone": "no caption",
    "a link": "link",
    "an empty text": "no caption",
    "a text that is too long": "caption too long",
    "a text that is no text": "not text",
    "a text of blanks": "no caption",
}


def kinds(own: dict[str, str]) -> list[str]:
    """The twenty: thirteen of image bytes and seven of the form's own."""
    found = [*images(0), *own]
    assert len(found) == 20
    return found


def csv_folder(root: Path, number: int, each: int) -> dict[int, str]:
    """A CSV dataset of ``number`` samples, ``each`` of every kind spoilt; row → cause."""
    (root / "train").mkdir(parents=True)
    (root.parent / "outside.jpg").write_bytes(encoded(photograph(0), "JPEG"))
    planted = dict(zip(places(number, 20 * each), kinds(CSV_KINDS) * each, strict=True))
    causes, lines = {}, [b"image,caption"]
    for row in range(number):
        kind, name, caption = planted.get(row), f"{row:04}.jpg", f"caption {row}"
        path = root / "train" / name
        data = odd(row) if row % 3 == 0 else encoded(photograph(row), "JPEG")
        if kind in images(row):
            data, causes[row] = images(row)[kind]
        elif kind is not None:
            causes[row] = CSV_KINDS[kind]
        if kind == "a folder":
            path.mkdir()
        elif kind == "a link out of the folder":
            path.symlink_to(root.parent / "outside.jpg")
        elif kind != "no file":
            path.write_bytes(data)
        if kind == "no name":
            name = ""
        elif kind == "a name that is too long":
            name = "n" * 300
        elif kind == "no caption":
            caption = "  "
        elif kind == "a caption that is too long":
            caption = LONG_CAPTION
        lines.append(f"{name},{caption}".encode())
    (root / "train_anno.csv").write_bytes(b"\n".join(lines) + b"\n")
    return causes


def shards(root: Path, number: int, each: int, per_shard: int = 100) -> dict[int, str]:
    """The same as tar shards."""
    (root / "train").mkdir(parents=True)
    planted = dict(zip(places(number, 20 * each), kinds(SHARD_KINDS) * each, strict=True))
    causes: dict[int, str] = {}
    for first in range(0, number, per_shard):
        with tarfile.open(root / "train" / f"{first // per_shard:05}.tar", "w") as tar:
            for row in range(first, min(first + per_shard, number)):
                for member, data in _members(row, planted.get(row), causes):
                    info = tarfile.TarInfo(f"{row:06}.{member}")
                    if data is None:
                        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                        tar.addfile(info)
                    else:
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return causes


def _members(
    row: int, kind: str | None, causes: dict[int, str]
) -> Iterator[tuple[str, bytes | None]]:
    data = odd(row) if row % 3 == 0 else encoded(photograph(row), "JPEG")
    if kind in images(row):
        data, causes[row] = images(row)[kind]
    elif kind is not None:
        causes[row] = SHARD_KINDS[kind]
    texts = {
        "an empty text": b"",
        "a text that is too long": LONG_CAPTION.encode(),
        "a text that is no text": b"caf\xe9 \xff",
        "a text of blanks": b" \n\t ",
    }
    if kind != "text alone":
        yield "jpg", None if kind == "a link" else data
    if kind != "an image alone":
        yield "txt", texts.get(str(kind), f"caption {row}".encode())
