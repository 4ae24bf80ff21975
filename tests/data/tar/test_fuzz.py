"""Minutes of damaged and hostile shards: every one is read to its end, and nothing else happens."""

import io
import os
import random
import string
import tarfile
import time

import pytest

from engine.data.image_files import MAX_IMAGE_BYTES
from engine.data.tables.table import texts_of
from engine.data.tar.samples import Plain, read_samples
from engine.data.tar.shards import open_shards
from engine.data.tar.texts import TextForm
from engine.data.tar.walk import BLOCK
from engine.errors import UserError
from engine.types import BadSample, Place, Row
from tests.data.formats.folders import image
from tests.data.tar.tar_files import picture

PROCESSOR_SECONDS = 180
LONGEST_SECONDS = 10  # for a shard of some kilobytes on a loaded machine
NAMES = ("a", "b.b", "../up", "/abs", "d/../e", "ü", "n" * 150, "", ".", "c\0d", "x" * 99)
ENDINGS = ("jpg", "txt", "json", "JPG", "png", "pyd", "jpg/x", "")
SIZES = (b"\x80" + bytes(11), b"\xff" * 12, b"-7", b"77777777777", b"0_1", bytes(30))
FIELDS = (
    b'{"caption": "x"}', b'{"captions": ["x", "y"], "caption_ids": [1]}', b"[[[[[[", b"{}", b"null",
    b'{"conversations": [{"from": "human", "value": "?"}]}', b'{"question": "q", "answers": [1]}',
    b'{"image_id": 1e999}', b'{"label": -7, "labels": "|"}', b'{"caption": "\\udc00"}', b"\xff",
)  # fmt: skip


def shard(generator):
    """A tar of a few members, hostile ones among them."""
    buffer = io.BytesIO()
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=generator.choice(forms)) as tar:
        for _ in range(generator.randrange(7)):
            name = f"{generator.choice(NAMES)}.{generator.choice(ENDINGS)}"
            data = generator.choice((picture(1), b"text", b"", *FIELDS))
            info = tarfile.TarInfo(name)
            info.type = generator.choice(
                (b"0", b"0", b"0", b"0", b"1", b"2", b"5", b"6", b"7", b"S")
            )
            info.size = len(data)
            info.mtime = generator.choice((0, 1.5))
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that the form cannot hold
                continue
    return bytearray(buffer.getvalue())


def harmed(generator, content):
    """The same with bytes changed, headers' sums made right again, and parts cut or doubled."""
    for _ in range(generator.randrange(5)):
        at = generator.randrange(len(content))
        if generator.random() < 0.5:  # in a header's field
            at = at // BLOCK * BLOCK + generator.choice((0, 124, 135, 148, 156, 257, 345))
        value = generator.choice(
            (
                generator.randbytes(4),
                b"\x80" + bytes(11),
                b"\xff" * 12,
                b"-7",
                b"77777777777",
                bytes(30),
            )
        )
        content[at : at + len(value)] = value
    if generator.random() < 0.6:
        for at in range(0, len(content) - BLOCK + 1, BLOCK):
            if content[at + 257 : at + 262] == b"ustar":
                content[at + 148 : at + 156] = b" " * 8
                content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])
    if generator.random() < 0.3:
        del content[generator.randrange(len(content) + 1) :]
    if generator.random() < 0.1:
        at = generator.randrange(0, len(content) + 1, BLOCK)
        content[at:at] = content[: 3 * BLOCK]
    if generator.random() < 0.03:
        content[:] = generator.randbytes(generator.randrange(4000))
    return bytes(content)


def check(path, generator):
    """One shard through rows, and now and then through its whole index."""
    content = harmed(generator, shard(generator))
    path.write_bytes(content)
    start = time.perf_counter()
    with path.open("rb") as file:
        rows = read_samples(file.fileno(), len(content), TextForm())
    rows = [_row(row) if isinstance(row, Plain) else row for row in rows]
    for row in rows:
        "".join((*texts_of(row), row.detail)).encode()
        if not row.cause and row.images:
            (image,) = row.images
            assert 0 <= image.offset <= image.offset + image.size <= len(content)
            assert ".." not in row.key.split("/") and not row.key.startswith("/")
    whole = not rows or any(row.cause for row in rows) or b"\0" * 2 * BLOCK in content
    assert whole, "damage that nobody is told of"
    if generator.random() < 0.05:
        read_all(path)
    assert time.perf_counter() - start < LONGEST_SECONDS


def _row(plain):
    return Row(plain.key, (Place("", plain.offset, plain.size),), plain.caption)


def read_all(path):
    """Every row through the source: a record, or a reason."""
    try:
        source = open_shards(
            [str(path)], name="x", split="train", root=path.parent, cache_dir=path.parent / "cache"
        )
    except UserError:
        return
    for index in range(len(source)):
        try:
            record = source[index]
        except BadSample as bad:
            assert bad.cause
        else:
            assert record.caption.strip()
            assert len(image(record) or b"") <= MAX_IMAGE_BYTES


def fuzz(folder, seconds, seed=0):
    """Shards until the processor time is spent; returns how many."""
    count, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        check(folder / f"{count % 50}.tar", random.Random(f"{seed} {count}"))
        count += 1
    return count


def test_a_second_of_it(tmp_path):
    assert fuzz(tmp_path, 1) > 20
    stray = {entry.name for entry in os.scandir(tmp_path)} - {f"{n}.tar" for n in range(50)}
    assert stray <= {".engine_cache"}


@pytest.mark.slow
def test_minutes_of_it(tmp_path):
    print(fuzz(tmp_path, PROCESSOR_SECONDS, string.ascii_letters), "shards")
