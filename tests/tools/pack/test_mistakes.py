"""Mistakes on the packer's command line: one message each, and nothing is written."""

import json

import pytest

from tests.tools.pack.packing import csv_folder, run, write_rows


def _refused(*argv):
    return run(*argv, code=2)


def test_a_wrong_path(tmp_path):
    printed = _refused(tmp_path / "absent", tmp_path / "b", "--to=csv")
    assert f"{tmp_path / 'absent'} is not a folder" in printed and "shapes" in printed
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in _refused(tmp_path / "file", tmp_path / "b", "--to=csv")
    assert not (tmp_path / "b").exists()


def test_a_folder_that_shows_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.md").touch()
    printed = _refused(tmp_path / "a", tmp_path / "b", "--to=csv")
    assert "does not show its format (there: notes.md)" in printed
    assert "--format F, one of" in printed and "llava" in printed


def test_an_unknown_format_or_option(tmp_path):
    source = csv_folder(tmp_path / "a")
    assert "did you mean 'csv'?" in _refused(source, tmp_path / "b", "--to=csv", "--format=cvs")
    printed = _refused(source, tmp_path / "b", "--to=csv", "--option=train_ano=x.csv")
    assert "train_ano" in printed and "did you mean 'train_anno'?" in printed
    printed = _refused(source, tmp_path / "b", "--to=csv", "--option=x")
    assert "not of the form name=value" in printed
    printed = _refused(source, tmp_path / "b", "--to=csv", "--option=cap=[1")
    assert "'[1' is not a YAML value" in printed
    assert "--valid-share is for images" in _refused(
        source, tmp_path / "b", "--to=csv", "--valid-share=0.1"
    )


def test_a_missing_column(tmp_path):
    source = csv_folder(tmp_path / "a")
    write_rows(source / "train_anno.csv", [("0.jpg", "x")], ("image", "words"))
    printed = _refused(source, tmp_path / "b", "--to=csv")
    assert "no column caption or title or text" in printed and "image, words" in printed


def test_a_missing_split(tmp_path):
    source = csv_folder(tmp_path / "a")
    printed = _refused(source, tmp_path / "b", "--to=csv", "--split=valid")
    assert f"has no image folder {source / 'valid'}" in printed


@pytest.mark.parametrize("flags", [(), ("--to=zip",), ("--to=csv", "--shard-size=0")])
def test_a_wrong_command_line(tmp_path, flags):
    printed = _refused(tmp_path, tmp_path / "b", *flags)
    assert printed.startswith("command line: ") and "python -m engine.tools.pack --help" in printed


def test_a_destination_with_something_else_in_it(tmp_path):
    source = csv_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").touch()
    assert "holds something else (precious)" in _refused(source, tmp_path / "b", "--to=csv")
    assert "holds something else" in _refused(source, source, "--to=webdataset")
    (tmp_path / "file").touch()
    assert "is a file" in _refused(source, tmp_path / "file", "--to=csv")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["precious"]


def test_a_destination_packed_otherwise(tmp_path):
    source = csv_folder(tmp_path / "a")
    run(source, tmp_path / "b", "--to=webdataset")
    assert "was packed to webdataset" in _refused(source, tmp_path / "b", "--to=csv")
    printed = _refused(source, tmp_path / "b", "--to=webdataset", "--shard-size=3")
    assert "packed from something else or otherwise (shard_size 10000, now 3)" in printed
    printed = _refused(source, tmp_path / "b", "--to=webdataset", "--captions=joined")
    assert "captions 'all', now 'joined'" in printed
    write_rows(source / "train_anno.csv", [("0.jpg", "0", "other words", "0")] * 7)
    assert "something else or otherwise (" in _refused(source, tmp_path / "b", "--to=webdataset")
    (tmp_path / "b" / ".pack" / "train.json").write_text("{")
    assert "is damaged; remove" in _refused(source, tmp_path / "b", "--to=webdataset")


def test_nothing_to_pack(tmp_path):
    source = csv_folder(tmp_path / "a")
    for path in (source / "train").glob("*.jpg"):
        path.unlink()
    (source / "train" / "sub" / "2.png").unlink()
    printed = _refused(source, tmp_path / "b", "--to=webdataset")
    assert "no sample of 'a' train can be used: 7 missing" in printed


def test_a_dataset_that_no_configuration_names(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"train_name": ["x"]}}))
    cfg = f"--cfg={tmp_path / 'run.yaml'}"
    assert "no dataset is called 'x'" in _refused("x", tmp_path / "b", "--to=csv", cfg)
    assert "to be under data.datasets" in _refused(
        "x", tmp_path / "b", "--to=csv", cfg, "--option=cap=1"
    )


def test_two_packers_of_one_destination(tmp_path):
    import fcntl

    source = csv_folder(tmp_path / "a")
    (tmp_path / "b" / ".pack").mkdir(parents=True)
    with (tmp_path / "b" / ".pack" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is packing" in _refused(source, tmp_path / "b", "--to=csv")
    run(source, tmp_path / "b", "--to=csv")
