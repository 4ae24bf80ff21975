"""Walking a tar's headers: the same members as tarfile finds, and every damage told."""

import io
import os
import subprocess
import tarfile
import time

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.tar import walk as tar_walk
from engine.data.tar.walk import BLOCK, Window, walk
from tests.data.tar.tar_files import kind, pairs, write_tar

FORMS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def walked(path):
    """All that is found in a file."""
    with path.open("rb") as file:
        return list(walk(Window(file.fileno()), os.fstat(file.fileno()).st_size))


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(each.name, each.offset_data, each.size, "", "") for each in tar if each.isfile()]


def damaged(path):
    """(cause, offset) of what is wrong with the archive as a whole."""
    return [(cause, at) for name, at, _, cause, _ in walked(path) if cause and not name]


def header(name, size, **changes):
    """A header with a right sum, whose fields at some places are other bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for start, content in ((int(place[1:]), value) for place, value in changes.items()):
        block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "b.txt", "c/d.json"],
        ["x" * 95 + ".jpg", "f" * 100],
        ["a/" * 60 + "long.jpg", "after.jpg"],
        ["größe/图.jpg", "next.txt"],
    ],
)
def test_the_same_members_as_tarfile(form, names, tmp_path):
    members = [(name, bytes([number]) * (300 * number)) for number, name in enumerate(names, 1)]
    path = write_tar(tmp_path / "a.tar", members, FORMS[form])
    assert walked(path) == by_tarfile(path)
    assert [name for name, *_ in walked(path)] == names


@pytest.mark.parametrize("length", [101, 256, 5000])
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_names_of_any_length(form, length, tmp_path):
    members = [("n" * (length - 4) + ".jpg", b"one"), ("b.txt", b"two")]
    path = write_tar(tmp_path / "a.tar", members, FORMS[form])
    assert walked(path) == by_tarfile(path)


def test_the_same_members_as_webdataset_writes(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            sample = {"jpg": os.urandom(40 * number), "txt": "text", "json": {"a": number}}
            writer.write({"__key__": f"{number:03d}", **sample})
    assert walked(path) == by_tarfile(path)
    assert len(walked(path)) == 60


def test_the_same_members_as_the_tar_command_writes(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number}.txt").write_bytes(b"x" * number * 70)
    for options in ([], ["--format=posix"], ["--format=v7"], ["-b", "1"]):
        path = tmp_path / "a.tar"
        subprocess.run(["tar", *options, "-cf", path, "-C", tmp_path, "in"], check=True)
        assert walked(path) == by_tarfile(path)


def test_sizes_of_8_gib_and_more_and_sums_of_signed_bytes(tmp_path):
    size = 9 << 30
    large = header("big.jpg", 0, _124=b"\x80" + size.to_bytes(11, "big"))
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(large)
        file.truncate(BLOCK + size)  # a hole takes no room
        file.seek(0, os.SEEK_END)
        signed = bytearray(header("ü.txt", 0))
        total = sum(signed) - sum(signed[148:156]) + 256 - 256 * sum(b > 127 for b in signed)
        signed[148:156] = b"%06o\0 " % total
        file.write(bytes(signed) + bytes(1024))
    assert [each[:3] for each in walked(path)] == [
        ("big.jpg", BLOCK, size),
        ("ü.txt", 2 * BLOCK + size, 0),
    ]


def test_links_devices_and_folders(tmp_path):
    members = [
        (kind("in", tarfile.DIRTYPE), b""),
        (kind("in/a.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (kind("in/b.jpg", tarfile.LNKTYPE, "in/a.jpg"), b""),
        (kind("in/c.jpg", tarfile.FIFOTYPE), b""),
        (kind("in/d.jpg", tarfile.CHRTYPE), b""),
        ("in/e.jpg", b"file"),
    ]
    found = walked(write_tar(tmp_path / "a.tar", members))
    assert [(name, cause) for name, _, _, cause, _ in found] == [
        ("in/a.jpg", "link"),
        ("in/b.jpg", "link"),
        ("in/c.jpg", "not a file"),
        ("in/d.jpg", "not a file"),
        ("in/e.jpg", ""),
    ]
    assert found[0][4] == "symbolic link to /etc/passwd"


def test_whole_archives_have_no_damage(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(7)))
    assert damaged(path) == []
    content = path.read_bytes().rstrip(b"\0")
    end = -(-len(content) // BLOCK) * BLOCK + 2 * BLOCK
    (tmp_path / "b.tar").write_bytes(content.ljust(end, b"\0"))  # without padding, as Go writes it
    assert damaged(tmp_path / "b.tar") == []
    assert damaged(write_tar(tmp_path / "c.tar", [])) == []


def test_each_damage_is_told_at_its_place(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [("a.jpg", b"a" * 700), ("b.txt", b"b")]).read_bytes()
    second = BLOCK + 1024  # b's header

    def after(change):
        (tmp_path / "a.tar").write_bytes(bytes(change(bytearray(whole))))
        return damaged(tmp_path / "a.tar"), [m[0] for m in walked(tmp_path / "a.tar") if not m[3]]

    def torn(content):
        content[second + 10] ^= 1
        return content

    def hole(content):
        content[second : second + 1024] = bytes(1024)
        return content + b"more".ljust(BLOCK, b"\0")

    assert after(lambda c: b"") == ([("empty shard", 0)], [])
    assert after(lambda c: c[:BLOCK]) == ([("truncated shard", second)], [])  # told of a too
    assert after(lambda c: c[: second + 512]) == ([("truncated shard", second + 1024)], ["a.jpg"])
    assert after(lambda c: c[: second + 1024]) == (
        [("truncated shard", second + 1024)], ["a.jpg", "b.txt"]
    )  # fmt: skip
    end = second + 1024
    assert after(lambda c: c[: end + BLOCK]) == ([("truncated shard", end)], ["a.jpg", "b.txt"])
    assert after(lambda c: c[: end + 1536]) == ([("truncated shard", end)], ["a.jpg", "b.txt"])
    assert after(lambda c: c[:-1]) == ([("truncated shard", end)], ["a.jpg", "b.txt"])
    assert after(torn) == ([("torn header", second)], ["a.jpg"])
    assert after(hole) == ([("torn header", second)], ["a.jpg"])
    assert after(lambda c: c + c) == ([("torn header", end)], ["a.jpg", "b.txt"] * 2)
    assert after(lambda c: b"<html>" * 1000) == ([("torn header", 0)], [])


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_told(form, tmp_path):
    with tarfile.open(tmp_path / "a.tar", f"w:{form}") as tar:
        for name, data in pairs(range(9)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert damaged(tmp_path / "a.tar") == [("compressed shard", 0)]


def test_members_after_a_torn_header_are_found(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"x" * 900) for n in range(6)])
    content = bytearray(path.read_bytes())
    content[2 * 1536 + 3] ^= 255
    path.write_bytes(content)
    assert damaged(path) == [("torn header", 3072)]
    assert [m[0] for m in walked(path) if m[0]] == ["0.txt", "1.txt", "3.txt", "4.txt", "5.txt"]


@pytest.mark.parametrize(
    "size", [b"-0000000005\0", b"7777777777x\0", b"0_0000000_1\0", b"\xff" * 12, b"\x80" * 12]
)
def test_a_size_that_is_none_is_a_torn_header(size, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header("a.jpg", 0, _124=size) + header("b.jpg", 0) + bytes(1024))
    names = [name for name, *_ in walked(path) if name]
    assert names == ["b.jpg"] or size.startswith(b"0_")  # Python reads 0_1 as a number
    assert not size.startswith(b"-") or damaged(path) == [("torn header", 0)]


@pytest.mark.parametrize(
    "records",
    [
        b"12 path=a.jp\n",
        b"x path=a\n",
        b"9999999 path=a\n",
        b"-3 path=a\n",
        b"0 path=a\n",
        b"9 size=x\n",
    ],
)
def test_malformed_pax_records_are_a_torn_header(records, tmp_path):
    path = tmp_path / "a.tar"
    content = header("pax", len(records), _156=b"x") + records.ljust(BLOCK, b"\0")
    path.write_bytes(content + header("b.jpg", 0) + bytes(1024))
    assert damaged(path) == [("torn header", 0)]
    assert [name for name, *_ in walked(path) if name] == ["b.jpg"]


def test_a_megabyte_of_tiny_pax_records_takes_no_time(tmp_path):
    records = b"6 a=b\n" * 170_000 + b"17 path=told.jpg\n"
    path = tmp_path / "a.tar"
    padded = records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0")
    content = header("pax", len(records), _156=b"x") + padded + header("b.jpg", 0)
    path.write_bytes(content + bytes(1024))
    start = time.perf_counter()
    assert [name for name, *_ in walked(path) if name] == ["told.jpg"]
    assert time.perf_counter() - start < 5


def check_any(content, path):
    """Whatever the bytes are: it ends, in order, inside the file, with each reason said."""
    path.write_bytes(content)
    place = -1
    for name, offset, size, cause, _ in walked(path):
        assert offset + (not name) > place, "the walk goes forward"
        place = offset
        assert size >= 0
        assert offset + size <= len(content) or cause == "truncated shard" or cause
        assert isinstance(name, str)
        assert max(name, default="") < "\ud800" or max(name) > "\udfff"


def _sample():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [*pairs(range(3)), ("d/" * 70 + "é.jpg", b"x" * 600)]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SAMPLE = _sample()
EDITS = st.lists(
    st.tuples(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=12)), max_size=6
)


def edited(edits, start, end):
    content = bytearray(SAMPLE)
    for place, value in edits:
        content[place : place + len(value)] = value
    return bytes(content[start : end + 1])


@given(edits=EDITS, start=st.integers(0, 3), end=st.integers(0, len(SAMPLE)))
@settings(max_examples=150, deadline=None)
def test_any_bytes(edits, start, end, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    check_any(edited(edits, BLOCK * start, end), path)


def resummed(content):
    """The same with every block that looks like a header given a right sum."""
    blocks = bytearray(content)
    for at in range(0, len(blocks) - BLOCK + 1, BLOCK):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + BLOCK])
    return bytes(blocks)


@given(edits=EDITS, end=st.integers(0, len(SAMPLE)))
@settings(max_examples=150, deadline=None)
def test_any_headers_with_right_sums(edits, end, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "summed.tar"
    check_any(resummed(edited(edits, 0, end)), path)


def test_few_reads_are_needed(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"text") for n in range(200)])
    reads = []
    whole = os.pread
    monkeypatch.setattr(tar_walk.os, "pread", lambda *a: reads.append(a) or whole(*a))
    walked(path)
    assert len(reads) < 40
