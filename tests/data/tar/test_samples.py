"""Members of a shard → rows: what belongs together, and what is lost, by its cause."""

import json
import os
import tarfile

import pytest

from engine.data.tar.samples import Plain, read_samples
from engine.data.tar.texts import TextForm
from engine.types import Place, Row
from tests.data.tar.tar_files import kind, pairs, picture, write_tar


def rows_of(path, form=None):
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = read_samples(file.fileno(), size, form or TextForm())
    return [_row(row) if isinstance(row, Plain) else row for row in found]


def _row(plain):
    return Row(plain.key, (Place("", plain.offset, plain.size),), plain.caption)


def bare(row):
    """The key of a row's sample."""
    return row.key.rpartition(".")[0] if row.images else row.key


def content(row, data):
    """The bytes of a row's image, which is inside ``data``."""
    (image,) = row.images
    return data[image.offset : image.offset + image.size]


def read(tmp_path, members, form=None):
    return rows_of(write_tar(tmp_path / "a.tar", members), form)


def causes(rows):
    return [(bare(row), row.cause) for row in rows]


def test_a_sample_is_an_image_and_its_text(tmp_path):
    own = b"the image's own bytes"
    rows = read(tmp_path, [("in/7.jpg", own), ("in/7.txt", b" a dog \n")])
    assert [(row.key, row.caption, row.cause) for row in rows] == [("in/7.jpg", "a dog", "")]
    assert content(rows[0], (tmp_path / "a.tar").read_bytes()) == own


def test_members_need_not_stand_together(tmp_path):
    members = list(pairs(range(5)))
    apart = [m for m in members if m[0].endswith("jpg")] + [m for m in members if "txt" in m[0]]
    rows = read(tmp_path, apart)
    expected = [(f"0000{n}", f"row {n}") for n in range(5)]
    assert [(bare(row), row.caption) for row in rows] == expected
    mixed = read(
        tmp_path, [apart[7], apart[0], apart[3], apart[8], *apart[4:7], *apart[1:3], apart[9]]
    )
    assert sorted(causes(mixed)) == causes(rows)


def test_endings_of_any_case_and_names_that_are_none(tmp_path):
    members = [
        ("A.JPG", b"x"),
        ("A.Txt", b"text"),
        ("LICENSE", b"x"),
        (".txt", b"x"),
        ("d/.jpg", b"x"),
    ]
    assert causes(read(tmp_path, members)) == [("A", "")]


def test_other_members_are_left_alone(tmp_path):
    members = [*pairs([0]), ("00000.pyd", b"\x80\x04."), ("00000.seg.png", b"x"), ("x.npy", b"x")]
    assert causes(read(tmp_path, members)) == [("00000", "")]


def test_a_member_left_alone_does_not_mislead_the_next(tmp_path):
    members = [*pairs([0]), ("x.npy", b"n"), ("x.jpg", b"x"), ("x.txt", b"of x"), ("/jpg", b"x")]
    rows = read(tmp_path, members)
    assert [(bare(row), row.caption) for row in rows] == [("00000", "row 0"), ("x", "of x")]


def test_other_endings_of_texts(tmp_path):
    members = [("a.jpg", b"x"), ("a.Caption", b"said"), ("a.txt", b"not this")]
    assert read(tmp_path, members, TextForm(text="caption"))[0].caption == "said"


def test_what_is_missing_is_named(tmp_path):
    members = [("a.jpg", b"x"), ("b.txt", b"text"), ("c.jpg", b"x"), ("c.txt", b" \n"), *pairs([9])]
    rows = read(tmp_path, members)
    assert causes(rows) == [
        ("a", "no caption"),
        ("b", "missing image"),
        ("c", "no caption"),
        ("00009", ""),
    ]
    assert "no txt and no json" in rows[0].detail


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"caf\xe9", "not text"),
        (b"\xff\xfea\x00", "not text"),
        (b"\xef\xbb\xbf", "no caption"),
        (b"\xef\xbb\xbf text", ""),
    ],
)
def test_texts_that_are_none(text, cause, tmp_path):
    row = read(tmp_path, [("a.jpg", b"x"), ("a.txt", text)])[0]
    assert (row.cause, row.caption) == (cause, "" if cause else "text")


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        (b"{", "corrupt"),
        (b"[]", "corrupt"),
        (b"[" * 100_000, "corrupt"),
        (b'{"caption": "\xe9"}', "not text"),
        (b'{"caption": "\\ud800"}', "not text"),
        (b'{"other": 1}', "no caption"),
        (b'{"caption": 3}', "malformed"),
        (b'{"caption": "x", "image_id": {}}', "malformed"),
        (b'{"conversations": [{"from": "who", "value": "x"}]}', "malformed"),
        (b'{"caption": ' + b"1" * 10_000 + b"}", "corrupt"),
    ],
)
def test_json_that_is_no_use(fields, cause, tmp_path):
    assert read(tmp_path, [("a.jpg", b"x"), ("a.json", fields)])[0].cause == cause


def told(tmp_path, fields, text=None, form=None):
    members = [("a.jpg", b"x"), ("a.json", json.dumps(fields).encode())]
    members += [("a.txt", text)] if text is not None else []
    return read(tmp_path, members, form)


def test_a_json_without_a_text(tmp_path):
    row = told(tmp_path, {"caption": "a dog", "key": "7", "sha256": "x"})[0]
    assert row == Row("a.jpg", row.images, "a dog")


def test_a_field_of_the_json_instead_of_the_text(tmp_path):
    form = TextForm(caption="alt")
    assert told(tmp_path, {"alt": "a cat"}, b"a dog", form)[0].caption == "a cat"
    row = told(tmp_path, {"caption": "a cat"}, b"a dog", form)[0]
    assert row.cause == "no caption"


def test_ids(tmp_path):
    row = told(tmp_path, {"image_id": 17, "caption_id": "c"}, b"a dog")[0]
    assert (row.caption, row.image_id, row.caption_id) == ("a dog", "17", "c")


def test_the_spaces_of_a_json_caption_are_kept(tmp_path):
    row = told(tmp_path, {"image_id": 1, "caption": "a dog . "}, b"a dog . ")[0]
    assert row.caption == "a dog . "


def test_several_captions_are_rows_of_one_image(tmp_path):
    fields = {"captions": ["one", "two"], "caption_ids": [4, 5], "image_id": "i"}
    rows = told(tmp_path, fields, b"one\ntwo")
    assert [(row.caption, row.caption_id, row.image_id) for row in rows] == [
        ("one", "4", "i"),
        ("two", "5", "i"),
    ]
    assert rows[0].images == rows[1].images


def test_conversations(tmp_path):
    turns = [("human", "<image>\nwhat?"), ("gpt", "a dog"), ("human", "why?"), ("gpt", "so")]
    fields = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    row = told(tmp_path, fields)[0]
    assert row.caption == "a dog"
    assert row.turns == tuple(turns)
    assert told(tmp_path, fields, b"its own caption")[0].caption == "its own caption"


def test_a_conversation_needs_no_image(tmp_path):
    fields = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    row = read(tmp_path, [("a.json", json.dumps(fields).encode())])[0]
    assert (row.cause, row.key, row.images, row.caption) == ("", "a", (), "!")


def test_questions_answers_and_labels(tmp_path):
    fields = {"question": "what?", "answers": ["cat", "dog", "dog"], "labels": "a|b", "label": 3}
    row = told(tmp_path, fields)[0]
    assert row.caption == "what? dog"
    assert (row.label, row.turns) == (3, (("human", "what?"), ("gpt", "dog")))
    assert (row.answers, row.labels) == (("cat", "dog", "dog"), ("a", "b"))


def test_links_and_names_that_lead_out_are_refused(tmp_path):
    members = [
        (kind("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""), ("a.txt", b"text"),
        ("../b.jpg", b"x"), ("../b.txt", b"text"),
        ("/c.jpg", b"x"), ("/c.txt", b"text"),
        ("d/../../e.jpg", b"x"), ("d/../../e.txt", b"text"),
        (kind("f.txt", tarfile.FIFOTYPE), b""), ("f.jpg", b"x"),
    ]  # fmt: skip
    assert causes(read(tmp_path, members)) == [
        ("a", "link"),
        ("../b", "outside root"),
        ("/c", "outside root"),
        ("d/../../e", "outside root"),
        ("f", "not a file"),
    ]


def test_duplicate_members_are_named(tmp_path):
    members = [*pairs([1]), ("00001.txt", b"again"), *pairs([2]), *pairs([1])]
    rows = read(tmp_path, members)
    assert causes(rows) == [
        ("00001", ""),
        ("00001", ""),
        ("00002", ""),
        ("00001", "duplicate member"),
    ]


def test_a_text_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.tar.samples._MAX_TEXT_BYTES", 10)
    rows = read(tmp_path, [("a.jpg", b"x" * 50), ("a.txt", b"x" * 11)])
    assert causes(rows) == [("a", "too large")]


def damaged(tmp_path, change, count=6):
    content = bytearray(write_tar(tmp_path / "a.tar", pairs(range(count))).read_bytes())
    (tmp_path / "a.tar").write_bytes(bytes(change(content)))
    return rows_of(tmp_path / "a.tar")


def at(content, name):
    return bytes(content).index(name.encode())


def test_a_torn_header_costs_its_sample_alone(tmp_path):
    def tear(name):
        def change(content):
            content[at(content, name) + 2] ^= 64
            return content

        return change

    for name in ("00002.jpg", "00002.txt"):
        assert causes(damaged(tmp_path, tear(name))) == [
            (f"{n:05d}", "torn header" if n == 2 else "") for n in range(6)
        ]


def test_a_cut_between_samples_has_its_own_row(tmp_path):
    rows = damaged(tmp_path, lambda content: content[: at(content, "00004.jpg")])
    assert causes(rows) == [*((f"{n:05d}", "") for n in range(4)), ("", "truncated shard")]
    assert "without an end mark" in rows[-1].detail


def test_a_cut_inside_a_sample_is_told_by_it(tmp_path):
    for name in ("00004.jpg", "00004.txt"):
        rows = damaged(tmp_path, lambda content, name=name: content[: at(content, name) + 600])
        assert causes(rows)[:4] == [(f"{n:05d}", "") for n in range(4)]
        assert causes(rows)[-1][1] == "truncated shard"
        assert len(rows) <= 6


def test_empty_files(tmp_path):
    (tmp_path / "a.tar").touch()
    assert causes(rows_of(tmp_path / "a.tar")) == [("", "empty shard")]


def test_pictures_are_what_tarfile_reads(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(range(4)))
    for number, row in enumerate(rows_of(path)):
        assert content(row, path.read_bytes()) == picture(number)
