"""Names of shards → the shards."""

import pytest

from engine.data.tar.urls import expand, is_remote
from engine.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("a.tar::{0..1}.tar", ["a.tar", "0.tar", "1.tar"]),
        (["b.tar", "a.tar"], ["b.tar", "a.tar"]),
        ("{one}.tar", ["{one}.tar"]),
    ],
)
def test_braces_and_lists(pattern, expected, tmp_path):
    assert expand(pattern, tmp_path) == [str(tmp_path / name) for name in expected]


def test_a_glob_is_sorted_and_looks_into_folders(tmp_path):
    for name in ("b/2.tar", "a/1.tar", "a/0.tar", "a/0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a/0.tar", "a/1.tar", "b/2.tar")]
    assert expand("*/*.tar", tmp_path) == found
    assert expand("**/*.tar", tmp_path) == found
    assert expand("a/[0].tar", tmp_path) == found[:1]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "[0].tar").touch()
    assert expand("[0].tar", tmp_path) == [str(tmp_path / "[0].tar")]


def test_absolute_and_file_urls(tmp_path):
    assert expand("/x/a.tar", tmp_path) == ["/x/a.tar"]
    assert expand("file:///x/a%20b.tar", tmp_path) == ["/x/a b.tar"]


@pytest.mark.parametrize(
    "url", ["pipe:cat a.tar", "http://h/a.tar", "s3://b/a.tar", "hf://datasets/x/a.tar"]
)
def test_remote_shards_stay_as_they_are(url, tmp_path):
    assert is_remote(url)
    assert expand(url, tmp_path) == [url]
    assert expand("https://h/{0..1}.tar") == ["https://h/0.tar", "https://h/1.tar"]


@pytest.mark.parametrize("url", ["a.tar", "/a/b.tar", "file:///a.tar", "odd:name.tar"])
def test_local_shards(url):
    assert not is_remote(url)


def test_what_names_nothing_is_told(tmp_path):
    (tmp_path / "there.tar").touch()
    with pytest.raises(UserError, match=r"no file matches .*tars in .*there.tar") as error:
        expand("*.tat", tmp_path, key="data.datasets.x.train")
    assert error.value.key == "data.datasets.x.train"
    with pytest.raises(UserError, match="no shard"):
        expand([], tmp_path)


def test_a_digit_too_many_does_not_fill_the_memory():
    with pytest.raises(UserError, match="more than 1,000,000 shards"):
        expand("{00000000000..99999999999}.tar")
