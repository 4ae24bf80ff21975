"""Exported folders: written whole or not at all, refused where they are not whole."""

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.export.folder import MANIFEST, new_folder, read_manifest, write_manifest

KEY = "export.output"


def write(target: Path, content: str = "weights") -> None:
    with new_folder(target, KEY) as made:
        (made / "part").mkdir()
        (made / "part" / "a.bin").write_text(content)
        write_manifest(made, {"task": "clip"})


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_read_back_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    write(target)
    assert read_manifest(target, verify=True)["task"] == "clip"
    write(target, "other weights")
    assert (target / "part" / "a.bin").read_text() == "other weights"
    assert names(target) == [MANIFEST, "part/a.bin"]
    assert read_manifest(target)["files"]["part/a.bin"]["bytes"] == 13
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_what_is_interrupted_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "export")
    for target in (tmp_path / "export", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt), new_folder(target, KEY) as made:
            (made / "half").write_text("x")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert read_manifest(tmp_path / "export", verify=True)


def test_other_content_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    write(mine)  # an empty folder may be used
    (mine / "notes.txt").write_text("of mine")
    (tmp_path / "file").write_text("not a folder")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / MANIFEST).write_text("[]")
    for target, told in ((mine, "notes.txt"), (tmp_path / "file", "not a folder"),
                         (foreign, MANIFEST),
                         (tmp_path / "file" / "below", "cannot write")):  # fmt: skip
        with pytest.raises(UserError, match=told) as caught:
            write(target)
        assert caught.value.key == KEY
    assert (mine / "notes.txt").read_text() == "of mine"


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "export"
    write(target)
    file = target / "part" / "a.bin"
    file.write_text("Weights")  # as long as before
    assert read_manifest(target)
    with pytest.raises(UserError, match=r"a\.bin is damaged"):
        read_manifest(target, verify=True)
    file.write_text("more")
    with pytest.raises(UserError, match=r"a\.bin is damaged"):
        read_manifest(target)
    file.unlink()
    with pytest.raises(UserError, match=r"a\.bin is missing"):
        read_manifest(target)
    with pytest.raises(UserError, match="not an exported folder"):
        read_manifest(tmp_path)
    (target / MANIFEST).write_text(json.dumps({"version": 99, "files": {}}))
    with pytest.raises(UserError, match="form 99"):
        read_manifest(target)
