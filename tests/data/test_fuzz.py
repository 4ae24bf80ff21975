"""Hostile annotation files: whatever their bytes, a clear error or rows; never a crash, never an
image from outside the folder."""

import base64
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine import registry
from engine.errors import UserError
from engine.types import BadSample, Row
from tests.data.formats.folders import image

_MINUTES = float(os.environ.get("FUZZ_MINUTES", "3"))  # of the slow form, over all formats
_SECRET = b"what lies outside"

_NAMES = st.sampled_from(
    ["a.jpg", "sub/a.jpg", "link.jpg", "../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "",
     "up/secret.jpg", "~/x", "C:x", "a\0b", "x" * 300, "\ud800", ".", "..", "sub"]
)  # fmt: skip
_NUMBERS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.just(10**400), st.just(float("nan"))
)
_ANY = st.recursive(
    st.none() | _NUMBERS | st.text(max_size=8) | _NAMES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def _mostly(good, *others):
    """Good values three times of four: a file must get past its first fault to meet a second."""
    return st.integers(0, 3).flatmap(lambda draw: st.one_of(*others) if draw == 3 else good)


_IDS = _mostly(st.integers(0, 1), st.integers(-1, 3), _ANY)
_TEXTS = _mostly(
    st.sampled_from(["a cat", "<image>\nWhat?", "é漢"]), st.sampled_from([" ", "\udfff"]), _ANY
)
_FILES = _mostly(st.sampled_from(["a.jpg", "sub/a.jpg"]), _NAMES)
_PICTURES = st.sampled_from([base64.b64encode(b"x" * 40).decode(), "a", "====", ""])


def _object(**fields):
    """An object with these keys, or some of them."""
    return _mostly(st.fixed_dictionaries(fields), st.fixed_dictionaries({}, optional=fields))


def _list(entry):
    return _mostly(st.lists(_mostly(entry, _ANY), min_size=1, max_size=4), _ANY, st.just([]))


_TURNS = _list(
    _object(**{"from": _mostly(st.sampled_from(["human", "gpt"]), _ANY), "value": _TEXTS})
)
_SENTENCES = _list(_object(raw=_TEXTS, sentid=_IDS))
_IMAGES = _object(
    filename=_FILES, filepath=_FILES, sentences=_SENTENCES, cocoid=_IDS,
    split=_mostly(st.just("train"), st.just("val"), _ANY),
)  # fmt: skip
_FORMS = {
    "coco": (
        {"train_anno": "x.json", "train_images": "images"},
        _object(
            images=_list(_object(id=_IDS, file_name=_FILES)) | _list(_IMAGES),
            annotations=_list(_object(id=_IDS, image_id=_IDS, caption=_TEXTS)),
        ),
    ),
    "llava": (
        {"train_anno": "x.json", "train_images": "images"},
        _list(_object(id=_IDS, image=_FILES | st.lists(_FILES, max_size=2), conversations=_TURNS)),
    ),
    "vqa": (
        {"train_questions": "x.json", "train_annotations": "x.json", "train_images": "images",
         "train_image_name": "%s"},
        _object(
            questions=_list(
                _object(question_id=_IDS, image_id=_IDS, question=_TEXTS, image=_FILES)
            ),
            annotations=_list(_object(question_id=_IDS, answers=_list(_object(answer=_TEXTS)))),
        ),
    ),
    "m3it": (
        {"train_anno": "x.json"},
        _list(
            _object(
                instruction=_TEXTS, inputs=_TEXTS, outputs=_TEXTS, id=_IDS,
                image_base64_str=_mostly(_PICTURES | st.lists(_PICTURES, max_size=2), _ANY),
            )
        ),
    ),
}  # fmt: skip


def _text(value, lines):
    """JSON of a value, one entry a line where asked; numbers that are too long are written too."""
    if lines and isinstance(value, list):
        return "\n".join(json.dumps(entry) for entry in value).encode()
    return json.dumps(value).encode()


@st.composite
def _spoiled(draw, data):
    """Bytes with some cut out, doubled, or put in."""
    if draw(st.booleans()):
        return data
    junk = [
        b"",
        b"[" * 2000,
        b'{"a":',
        b"\xff",
        b"\0",
        b'"',
        b"]",
        b"9" * 5000,
        b"NaN",
        b"\\u",
        b",\n",
    ]
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        data = data[:start] + draw(st.sampled_from(junk)) + data[end:]
    return data


@st.composite
def _json_files(draw, form):
    return draw(_spoiled(_text(draw(_FORMS[form][1]), draw(st.booleans()))))


_CELLS = st.one_of(
    _NAMES.map(lambda name: name.encode(errors="replace")),
    st.binary(max_size=6),
    st.sampled_from(
        [b'"', b'""', b'"a,b"', b"a|b", b"a\nb", b'"a\r\nb"', b"\xff", b"1", b"x" * 5000]
    ),
)
_HEADS = st.sampled_from(
    [b"image", b"caption", b"image_id", b"question", b"answers", b"labels", b"filepath", b"x", b""]
)


@st.composite
def _csv_files(draw):
    mark = draw(st.sampled_from([b",", b"\t", b";", b"|"]))
    head = draw(_mostly(st.just([b"image", b"caption"]), st.lists(_HEADS, max_size=5)))
    cells = _mostly(st.just(b"a.jpg"), _CELLS)
    rows = draw(st.lists(st.lists(cells, min_size=len(head), max_size=len(head)), max_size=4))
    data = b"\n".join(mark.join(row) for row in [head, *rows])
    return draw(_spoiled(data))


def _check(form, data, options):
    """The file is refused with its name, or every row of it is a record or a bad sample."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "secret.jpg").write_bytes(_SECRET)
        (root / "images" / "sub").mkdir(parents=True)
        (root / "images" / "link.jpg").symlink_to(root / "secret.jpg")
        (root / "images" / "up").symlink_to(root)
        (root / ("x.csv" if form == "csv" else "x.json")).write_bytes(data)
        module = registry.find("data/formats", form)
        config = module.Config(root=root, **options)
        try:
            source = module.build(config, name="mine", split="train", cache_dir=root / "cache")
        except UserError as error:
            assert "x.csv" in str(error) or "x.json" in str(error)
            return 0
        assert len(list(source.captions())) == len(source) == len(source.column("image_id"))
        return sum(_usable(source, index, root / "images") for index in range(len(source)))


def _usable(source, index, images):
    try:
        record = source[index]
        image(record)
    except BadSample as bad:
        assert bad.cause and "\n" not in bad.cause
        return False
    assert isinstance(record, Row) and record.caption.strip()
    record.caption.encode()
    if isinstance(image(record), Path):
        assert image(record).resolve().is_relative_to(images.resolve())
        with contextlib.suppress(OSError):  # no such file, or no name that a file can have
            assert image(record).read_bytes() != _SECRET
    return True


def _fuzz(form, files, options, *, examples, until=None):
    """Count of files tried and of usable rows in them; stops at a time where one is given."""
    counts = [0, 0]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=until is None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(files)
    def run(data):
        if until is not None and time.process_time() > until:
            return
        counts[0] += 1
        counts[1] += _check(form, data, options)

    run()
    return counts


_CSV_OPTIONS = {"train_anno": "x.csv", "train_images": "images"}
_ALL = ["csv", *_FORMS]


def _case(form):
    return (_csv_files(), _CSV_OPTIONS) if form == "csv" else (_json_files(form), _FORMS[form][0])


@pytest.mark.parametrize("form", _ALL)
def test_hostile_files(form):
    files, options = _case(form)
    _fuzz(form, files, options, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("form", _ALL)
def test_hostile_files_for_minutes(form):
    """FUZZ_MINUTES minutes of CPU time over all formats (3 by default)."""
    files, options = _case(form)
    end = time.process_time() + 60 * _MINUTES / len(_ALL)
    tried = usable = 0
    while time.process_time() < end:
        counts = _fuzz(form, files, options, examples=500, until=end)
        tried, usable = tried + counts[0], usable + counts[1]
    print(f"\n{form}: {tried} files, {usable} usable rows")
    assert tried > 100 and usable > 0
