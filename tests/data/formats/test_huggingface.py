"""Folders of the ``datasets`` library, written here as it writes them."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from tests.data.formats.folders import folder, image, images, opened, picture, rows

_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _table(captions, first=0):
    images = [{"bytes": picture(first + i), "path": f"{i}.png"} for i in range(len(captions))]
    return pa.table({"image": pa.array(images, _STRUCT), "caption": captions})


def _stream(path, table, rows=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, rows)


def _saved(root, *tables, **state):
    """A folder as ``Dataset.save_to_disk`` leaves it."""
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        _stream(root / name, table)
    files = [{"filename": name} for name in names]
    (root / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **state}))
    (root / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return root


def test_a_saved_dataset(tmp_path):
    root = _saved(tmp_path / "set", _table(["a", "b", "c"]), _table(["d", "e"], 3))
    source = opened("huggingface", root)
    found = rows(source)
    assert [r.caption for r in found] == ["a", "b", "c", "d", "e"]
    assert [image(r) for r in found] == [picture(i) for i in range(5)]
    assert rows(pickle.loads(pickle.dumps(source))) == found
    assert source.parts.path.stat().st_size < 20_000  # the images stay where they are


def test_a_saved_dictionary_of_datasets(tmp_path):
    _saved(tmp_path / "train", _table(["a"]))
    _saved(tmp_path / "validation", _table(["b"]))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert rows(opened("huggingface", tmp_path))[0].caption == "a"
    assert rows(opened("huggingface", tmp_path, "valid"))[0].caption == "b"
    assert rows(opened("huggingface", tmp_path, "valid", valid="train"))[0].caption == "a"
    with pytest.raises(UserError, match=r"no split test; its splits: train, validation") as caught:
        opened("huggingface", tmp_path, "valid", valid="test")
    assert caught.value.key == "data.datasets.mine.valid"


def test_arrow_files_of_the_cache(tmp_path):
    _stream(tmp_path / "mine-train-00000-of-00002.arrow", _table(["a"]))
    _stream(tmp_path / "mine-train-00001-of-00002.arrow", _table(["b"]))
    _stream(tmp_path / "mine-val.arrow", _table(["c"]))
    assert [r.caption for r in rows(opened("huggingface", tmp_path))] == ["a", "b"]
    assert [r.caption for r in rows(opened("huggingface", tmp_path, "valid"))] == ["c"]


def test_parquet_files_of_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for name, captions in (("train-00000-of-00001", ["a", "b"]), ("validation-0[1]", ["c"])):
        pq.write_table(_table(captions), tmp_path / "data" / f"{name}.parquet")
    assert [r.caption for r in rows(opened("huggingface", tmp_path))] == ["a", "b"]
    (record,) = rows(opened("huggingface", tmp_path, "valid"))
    assert (record.caption, image(record)) == ("c", picture(0))
    with pytest.raises(UserError, match=r"no split dev in .*: data/train-0.*parquet, data/valid"):
        opened("huggingface", tmp_path, "valid", valid="dev")


def test_base64_lists_and_instructions(tmp_path):
    """M3IT as the hub has it."""
    import base64

    texts = [[base64.b64encode(picture(4)).decode()], []]
    table = pa.table(
        {"instruction": ["Look."] * 2, "inputs": [""] * 2, "image_base64_str": texts,
         "outputs": ["x", "y"]}
    )  # fmt: skip
    first, second = rows(opened("huggingface", _saved(tmp_path / "set", table)))
    assert image(first) == picture(4) and first.turns == (("human", "Look."), ("gpt", "x"))
    assert image(second) is None


def test_paths(tmp_path):
    root = _saved(tmp_path, pa.table({"image": ["a.png", "../b.png"], "caption": ["x", "y"]}))
    folder(root, "a.png")
    found = rows(opened("huggingface", root))
    assert image(found[0]) == root / "a.png" and found[1] == "outside root"


def test_a_state_that_leads_elsewhere(tmp_path):
    for state in (
        {"_data_files": [{"filename": "../x.arrow"}]},
        {"_data_files": 3},
        {"_data_files": [1]},
    ):
        _saved(tmp_path, _table(["a"]), **state)
        with pytest.raises(UserError, match=r"state\.json does not list its data files"):
            opened("huggingface", tmp_path)
    _saved(tmp_path, _table(["a"]), _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UserError, match="flatten_indices"):
        opened("huggingface", tmp_path)
    (tmp_path / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read .*state\.json"):
        opened("huggingface", tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, 0.9, -8, -1])
def test_torn_files(tmp_path, keep):
    """Cut anywhere, a file is refused; its last eight bytes are the mark of its end."""
    root = _saved(tmp_path, _table([f"caption {i}" for i in range(20)]))
    path = root / "data-00000-of-00001.arrow"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow"):
        opened("huggingface", root)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no split train in .*: none"):
        opened("huggingface", tmp_path)
    encoded = pa.table({"image": [b"x"], "caption": pa.array(["a"]).dictionary_encode()})
    with pytest.raises(UserError, match=r"'caption' of .* is dictionary-encoded"):
        opened("huggingface", _saved(tmp_path / "codes", encoded))
    with pytest.raises(UserError, match=r"none of the columns .*its columns are: a"):
        opened("huggingface", _saved(tmp_path / "bare", pa.table({"a": [1]})))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_batches_are_copied_once(tmp_path, codec):
    table = _table(["a", "b", "c"])
    root = _saved(tmp_path / "set", table)
    options = pa.ipc.IpcWriteOptions(compression=codec)
    path = str(root / "data-00000-of-00001.arrow")
    with pa.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table, 2)
    found = rows(opened("huggingface", root))
    assert [image(row) for row in found] == [picture(i) for i in range(3)]
    (copy,) = (root / ".engine_cache").glob("*.arrows")
    stamp = copy.stat().st_mtime_ns
    assert rows(opened("huggingface", root)) == found and copy.stat().st_mtime_ns == stamp


def test_wide_texts_and_bytes(tmp_path):
    kinds = pa.schema([("image", pa.large_list(pa.large_binary())), ("caption", pa.large_string())])
    table = pa.table({"image": [[picture(1)], [picture(2), picture(3)]], "caption": ["x", "y"]})
    root = _saved(tmp_path, table.cast(kinds))
    found = rows(opened("huggingface", root, several_images="all"))
    assert [images(row) for row in found] == [[picture(1)], [picture(2), picture(3)]]
