"""JSON files as streams of entries: what they yield, where it lies, and what hostile files meet."""

import gzip
import json

import pytest

from engine.data.tables import json_rows
from engine.data.tables.json_rows import read_list, read_rows
from engine.errors import UserError

_ENTRIES = [
    {"a": 1, "b": ["x", None, 2.5e3]},
    {"c": 'é – 漢 \U0001f600 \\ " ]}'},
    {},
    {"d": [[[]]]},
]


@pytest.fixture(autouse=True, params=[1 << 20, 1, 7], ids=lambda size: f"read{size}")
def read_bytes(request, monkeypatch):
    """How much is read at once must not matter."""
    monkeypatch.setattr(json_rows, "_READ_BYTES", request.param)


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _values(entries):
    return [entry.value for entry in entries]


def _at(path, entry):
    """What is at an entry's place."""
    content = path.read_bytes()[entry.offset : entry.offset + entry.extent]
    return json.loads(content.decode("utf-8-sig"))


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte_order_mark"])
def test_a_list(tmp_path, options, mark):
    path = _write(tmp_path / "a.json", mark + json.dumps(_ENTRIES, **options).encode() + b" \n")
    entries = list(read_rows(path))
    assert _values(entries) == _ENTRIES
    assert [entry.number for entry in entries] == [1, 2, 3, 4]
    assert [_at(path, entry) for entry in entries] == _ENTRIES


def test_lines(tmp_path):
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in _ENTRIES)
    path = _write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + text.replace("\n", "\n\n").encode())
    entries = list(read_rows(path))
    assert _values(entries) == _ENTRIES
    assert [_at(path, entry) for entry in entries] == _ENTRIES


def test_a_list_under_a_key(tmp_path):
    whole = {"info": {"x": [1]}, "licenses": [{"id": 1}, 2], "images": _ENTRIES, "n": 12, "z": []}
    path = _write(tmp_path / "a.json", json.dumps(whole))
    assert _values(read_list(path, "images")) == _ENTRIES
    assert _values(read_list(path, "z")) == []
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(path.read_bytes())
    assert _values(read_list(tmp_path / "a.json.gz", "images")) == _ENTRIES


def test_a_list_that_is_not_there(tmp_path):
    path = _write(tmp_path / "a.json", '{"pictures": [], "n": 3}')
    with pytest.raises(UserError, match=r"no list 'images'; its keys: pictures, n"):
        list(read_list(path, "images"))
    with pytest.raises(UserError, match=r"'n' of .* is not a list"):
        list(read_list(path, "n"))
    with pytest.raises(UserError, match="not a JSON object with 'images'"):
        list(read_list(_write(tmp_path / "b.json", "[]"), "images"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"[" * 100_000, "entry 1: .*nests too deeply"),
        (b'[{"a": ' + b"[" * 100_000, "entry 1: .*nests too deeply"),
        (b"[1, " + b"9" * 5000 + b"]", "entry 2: .*digits"),
        (b'[{"a": 1}, {"b": 2', "entry 2: not JSON"),
        (b'[{"a": 1} {"b": 2}]', "entry 1: .*a comma or ] is wanted at byte 10"),
        (b'[{"a": 1},', "entry 2: not JSON"),
        (b'[{"a": 1}', "entry 1: .*a comma or ]"),
        (b'[{"a": tru}]', "entry 1: .*Expecting value at byte 7"),
        (b"[1] [2]", "more follows the end of the list at byte 4"),
        (b'[{"a": "\x00"}]', "entry 1: .*control character"),
    ],
)
def test_hostile_lists(tmp_path, text, told):
    path = _write(tmp_path / "bad.json", text)
    with pytest.raises(UserError, match=told) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


def test_faults_of_lines_are_theirs_alone(tmp_path):
    lines = [b'{"a": 1}', b"[" * 100_000, b"{", b"9" * 5000, b"\xff", b'{"a": 2}', b'{"a"']
    entries = list(read_rows(_write(tmp_path / "a.jsonl", b"\n".join(lines))))
    assert [entry.value for entry in entries if not entry.fault] == [{"a": 1}, {"a": 2}]
    assert "nests too deeply" in entries[1].fault
    assert "digits" in entries[3].fault


def test_an_entry_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ENTRY", 1000)
    path = _write(tmp_path / "a.json", '[{"a": 1}, "' + "x" * 5000 + '"]')
    with pytest.raises(UserError, match=r"entry 2: .*longer than 1000"):
        list(read_rows(path))
    text = '{"a": 1}\n{"b": "' + "x" * 5000 + '"}\n{"c": 1}\n'
    entries = list(read_rows(_write(tmp_path / "a.jsonl", text)))
    assert _values(entries) == [{"a": 1}, None, {"c": 1}]
    assert "longer than 1000" in entries[1].fault
    assert text.encode()[entries[2].offset :].startswith(b'{"c"')


@pytest.mark.parametrize("keep", [5, 30, 60])
def test_a_torn_gzip_file(tmp_path, keep):
    packed = gzip.compress(json.dumps(_ENTRIES * 20).encode(), mtime=0)
    path = _write(tmp_path / "a.json.gz", packed[:keep])
    with pytest.raises(UserError, match=r"a\.json\.gz"):
        list(read_rows(path))
    with pytest.raises(UserError, match="not a whole gzip file"):
        list(read_rows(_write(tmp_path / "b.json.gz", b"no gzip")))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.json: No such file"):
        list(read_rows(tmp_path / "none.json"))
