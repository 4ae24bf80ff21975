"""Which rows are of one image."""

import os

import numpy as np
import pytest

from engine.data.groups import group_rows
from engine.errors import UserError


class Coded:
    name, split = "mine", "train"

    def __init__(self, codes):
        self.codes = np.array(codes, np.int64)

    def column(self, name):
        assert name == "image_id"
        return self.codes


def rows_of(groups):
    return [groups[image].tolist() for image in range(len(groups))]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 1, 2, 2], [[0, 1], [2], [3, 4]]),
        ([7, 3, 7, 5, 3], [[0, 2], [1, 4], [3]]),  # in the order of their first rows
        ([0, -1, 0, -1], [[0, 2], [1], [3]]),  # without an image_id: each an image of its own
        ([-1], [[0]]),
        ([], []),
    ],
)
def test_rows_of_each_image(tmp_path, codes, expected):
    groups = group_rows(Coded(codes), tmp_path)
    assert rows_of(groups) == expected
    assert groups.rows.tolist() == [row for rows in expected for row in rows]
    assert groups.firsts().tolist() == [rows[0] for rows in expected]
    assert groups.sizes(0, len(groups)).tolist() == [len(rows) for rows in expected]
    for image in (-1, len(groups)):
        with pytest.raises(IndexError):
            groups[image]


def test_written_once_and_mapped(tmp_path, monkeypatch):
    first = group_rows(Coded([0, 1, 0]), tmp_path)
    monkeypatch.setattr("engine.data.groups._write", None)  # not called again
    again = group_rows(Coded([0, 1, 0]), tmp_path)
    assert first.path == again.path
    base = again.rows
    while not isinstance(base, np.memmap):
        base = base.base


def test_other_rows_get_another_file_and_the_old_one_goes(tmp_path):
    first = group_rows(Coded([0, 1, 0]), tmp_path)
    second = group_rows(Coded([0, 1, 1]), tmp_path)
    assert rows_of(first) == [[0, 2], [1]]  # what was mapped stays readable
    assert rows_of(second) == [[0], [1, 2]]
    assert [path.name for path in tmp_path.glob("*.npy")] == [second.path.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write in"):
        group_rows(Coded([0]), tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        group_rows(Coded([0]), tmp_path / "file")
