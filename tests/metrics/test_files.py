"""CSV files that users hand in: what is read of them, and mistakes by file and line."""

import gzip

import pytest

from engine.errors import UserError
from engine.metrics.files import read_csv


def test_values_by_column_with_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfimage,text\r\na.png,"two\nlines, ""said"""\r\n\r\nb.png,\r\n')
    wanted = (
        ["image", "text"],
        [
            (3, {"image": "a.png", "text": 'two\nlines, "said"'}),
            (5, {"image": "b.png", "text": ""}),
        ],
    )
    assert read_csv(path) == wanted
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_csv(packed) == wanted
    long = tmp_path / "long.csv"
    long.write_text("image,text\na.png," + 140_000 * "b" + "\n", encoding="utf8")
    assert read_csv(long)[1] == [(2, {"image": "a.png", "text": 140_000 * "b"})]
    tabs = tmp_path / "a.tsv"
    tabs.write_text("image\ttext\na,b\tc\n", encoding="utf8")
    assert read_csv(tabs)[1] == [(2, {"image": "a,b", "text": "c"})]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; its first line must name its columns"),
        (b'"image"x,text\na,b\n', "line 1: ',' expected after"),
        (b"image,text\na,b,c\n", "line 2: more values than columns"),
        (b"image,text\na,b\nc\n", "line 3: fewer values than columns"),
        (b'image,text\na,"b\n', "line 2: unexpected end of data"),
        (b"image,text\n\xff,b\n", "is not text in UTF-8"),
    ],
)
def test_mistakes(tmp_path, content, told):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.csv.* {told}|a.csv, {told}"):
        read_csv(path)
