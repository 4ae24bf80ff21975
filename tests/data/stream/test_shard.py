"""A shard as it arrives: its samples in order, and every damage told."""

import io
import random
import tarfile

from engine.data.stream.source import WHOLE_SHARD, read_shard
from engine.data.tar.texts import TextForm
from tests.data.formats.folders import image
from tests.data.stream.shard_server import picture, write_shard


def items(path):
    return list(read_shard(str(path), TextForm()))


def test_a_shard_gives_its_samples_in_order(tmp_path):
    found = items(write_shard(tmp_path / "a.tar", range(5), bad=[3]))
    assert [(item.number, item.key) for item in found] == [(n, f"{n:05d}") for n in range(5)]
    assert found[4].row.caption == "row 4"
    assert image(found[4].row) == picture(4)
    assert found[3].row is None
    assert found[3].bad.cause == "no caption"


def test_a_cut_anywhere_is_told(tmp_path):
    whole = write_shard(tmp_path / "a.tar", range(6)).read_bytes()
    last = whole.rindex(b"row 5")  # what follows are zeros: padding and the end mark
    end = last + 512 + 1  # inside the first block of the mark
    rng = random.Random(0)
    torn = tmp_path / "torn.tar"
    for cut in sorted({0, 1, 512, end, *(rng.randrange(end) for _ in range(60))}):
        torn.write_bytes(whole[:cut])
        found = items(torn)
        assert found[-1].number == WHOLE_SHARD, cut
        assert found[-1].bad.cause == "truncated shard"
        samples = found[:-1]
        assert [item.number for item in samples] == list(range(len(samples)))
        assert all(image(item.row) == picture(item.number) for item in samples)
        assert len(samples) >= 6 * cut // len(whole) - 2


def test_a_torn_header_is_told_and_what_came_before_is_kept(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(6))
    data = bytearray(path.read_bytes())
    at = data.index(b"00003.jpg")
    data[at : at + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    found = items(path)
    assert [item.key for item in found[:-1]] == [f"{n:05d}" for n in range(3)]
    assert found[-1].bad.cause == "torn header"


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content, *kind in members:
            header = tarfile.TarInfo(name)
            if kind:
                header.type, header.linkname = kind[0], "/etc/passwd"
            header.size = 0 if kind else len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def test_links_and_pickles_are_never_looked_at(tmp_path):
    members = [("0.jpg", b"", tarfile.SYMTYPE), ("0.txt", b"a"), ("0.pyd", b"b"), ("0.jpg", b"c")]
    (only,) = items(tar_of(tmp_path / "a.tar", *members))
    assert (image(only.row), only.row.caption) == (b"c", "a")


def test_what_a_sample_lacks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.stream.source.MAX_IMAGE_BYTES", 10)
    members = [("0.jpg", b"a"), ("1.txt", b"b"), ("2.jpg", b"c" * 11), ("2.txt", b"d")]
    members += [("../3.jpg", b"e"), ("../3.txt", b"f"), ("4.json", b"{"), ("4.jpg", b"g")]
    found = items(tar_of(tmp_path / "a.tar", *members))
    assert [item.bad.cause for item in found] == [
        *("no caption", "missing image", "too large", "outside root", "corrupt")
    ]


def test_every_caption_is_a_row(tmp_path):
    both = b'{"captions": ["one", "two"], "image_id": "7"}'
    members = [("0.jpg", b"a"), ("0.json", both), ("1.png", b"b"), ("1.txt", b"three")]
    found = items(tar_of(tmp_path / "a.tar", *members))
    assert [(item.number, item.row.caption) for item in found] == [
        *((0, "one"), (1, "two"), (2, "three"))
    ]
    assert [item.row.image_id for item in found] == ["7", "7", "1"]
