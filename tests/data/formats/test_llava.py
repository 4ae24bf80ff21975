"""Conversations in LLaVA's form."""

import json
import pickle

import pytest

from engine.config.schema import Config, Transforms
from engine.data.batch_memory import stack_several
from engine.data.loader import train_batches
from engine.data.reader import Limits
from engine.data.transforms import pipeline
from engine.errors import UserError
from engine.train.plan import make_plan
from tests.data.formats.folders import folder, image, opened, put, rows


def _sample(*texts, **more):
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "x1", "conversations": turns, **more}


@pytest.fixture
def root(tmp_path):
    return folder(tmp_path / "set", "train/a.jpg", "train/coco/b.jpg")


def test_turns_of_a_conversation(root):
    texts = ("<image>\nWhat is it?", "A cat.", "Its colour?", "Black.")
    put(root / "train.json", [_sample(*texts, image="coco/b.jpg"), _sample("Hi", "Ho", id=12)])
    source = opened("llava", root)
    first, second = rows(source)
    assert first.turns == tuple(zip(("human", "gpt") * 2, texts, strict=True))
    assert first.caption == "A cat."
    assert image(first) == root / "train" / "coco" / "b.jpg"
    assert (first.image_id, first.caption_id) == ("coco/b.jpg", "x1")
    assert image(second) is None and second.turns == (("human", "Hi"), ("gpt", "Ho"))
    assert second.caption_id == "12"
    assert list(source.captions()) == ["A cat.", "Ho"]
    assert rows(pickle.loads(pickle.dumps(source))) == [first, second]


def test_json_lines(root):
    put(root / "valid.jsonl", [_sample("q", "a", image="a.jpg"), _sample("q", "b")])
    options = {"valid_anno": "valid.jsonl", "valid_images": "train"}
    assert [r.caption for r in rows(opened("llava", root, "valid", **options))] == ["a", "b"]


def test_text_alone_needs_no_image_folder(tmp_path):
    put(tmp_path / "train.json", [_sample("q", "a"), _sample("q", "b", image=None)])
    assert [image(r) for r in rows(opened("llava", tmp_path))] == [None, None]
    put(tmp_path / "train.json", [_sample("q", "a", image="a.jpg")])
    with pytest.raises(UserError, match=r"no image folder .*/train"):
        opened("llava", tmp_path)


def test_several_images(root):
    images = [["a.jpg"], ["coco/b.jpg", "a.jpg"], []]
    put(root / "train.json", [_sample("q", "a", image=image) for image in images])
    assert [r.key for r in rows(opened("llava", root))] == ["a.jpg", "coco/b.jpg", "row 3"]
    found = rows(opened("llava", root, several_images="refuse"))
    assert found[0].key == "a.jpg" and found[1] == "several images" and image(found[2]) is None
    found = rows(opened("llava", root, several_images="all"))
    assert [record.images[1:] for record in found] == [(), (root / "train" / "a.jpg",), ()]
    bad = [["a.jpg", "../secret.jpg"], ["a.jpg", ""], ["a.jpg"], ["gone.jpg", "a.jpg"]]
    put(root / "train.json", [_sample("q", "a", image=image) for image in bad])
    found = rows(opened("llava", root, several_images="all"))
    assert found[:2] == ["outside root", "missing"] and not found[2].images[1:]
    assert image(found[3]) == root / "train" / "gone.jpg"  # that it is not there is told when read


def test_speakers_take_turns(root):
    turns = [{"from": who, "value": "x"} for who in ("human", "human", "gpt")]
    greeted = [{"from": who, "value": who} for who in ("gpt", "human", "gpt")]
    put(root / "train.json", [{"conversations": turns}, {"conversations": greeted}])
    first, second = rows(opened("llava", root))
    assert first == "malformed" and [who for who, _ in second.turns] == ["gpt", "human", "gpt"]


def test_other_speakers(root):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    strange = [{"from": "narrator", "value": "once"}]
    put(root / "train.json", [{"conversations": turns}, {"conversations": strange}])
    assert rows(opened("llava", root))[0].turns == (("human", "q"), ("gpt", "a"))
    assert rows(opened("llava", root))[1] == "malformed"


def test_entries_that_are_something_else(root):
    samples = [
        _sample("q", "a", image="a.jpg"), 1, None, "text", [], {},
        {"conversations": {}}, {"conversations": [1]}, {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": 3, "value": "x"}]}, _sample("q", None), _sample("q", 5),
        _sample("q", "a", image=5), _sample("q", "a", image=[["a.jpg"]]),
        _sample("q", "a", id=float("nan")), _sample("q", "a", id=10**50), _sample("q", "a", id={}),
        _sample("q", "a", image=""), _sample("q"), _sample("q", "a", image="../../etc/passwd"),
        _sample("q", "\udfff"), _sample("q", "a", image="\udfff.jpg"), {"conversations": []},
    ]  # fmt: skip
    put(root / "train.json", samples)
    found = rows(opened("llava", root))
    assert found[0].caption == "a"
    assert found[1:17] == ["malformed"] * 16
    assert found[17:] == [
        "missing", "no answer", "outside root", "not text", "not text", "no caption"
    ]  # fmt: skip


def test_mistakes_are_named(root):
    with pytest.raises(UserError, match=r"no annotation file .*train\.json; .*: none"):
        opened("llava", root)
    put(root / "train.json", [{"id": 1, "image": "a.jpg", "text": "x"}])
    with pytest.raises(UserError, match=r"entry 1: no 'conversations'; its keys: id, image, text"):
        opened("llava", root)
    (root / "train.json").write_text('[{"conversations": [}]')
    with pytest.raises(UserError, match=r"train\.json, entry 1: not JSON"):
        opened("llava", root)


def test_the_table_is_made_anew_when_the_file_changes(root):
    path = put(root / "train.json", [_sample("q", "old")])
    old = opened("llava", root)
    put(path, [_sample("q", "newer")])
    assert rows(opened("llava", root))[0].caption == "newer"
    assert rows(old)[0].caption == "old"
    assert len(list((root / ".engine_cache").glob("*.arrow"))) == 1


def test_real_conversations(shared_data, tmp_path):
    """The captions of the conversations are those of the CSV beside them."""
    real = shared_data / "llava_1k"
    (tmp_path / "train.json").symlink_to(real / "train_conversations.json")
    (tmp_path / "train_anno.csv").symlink_to(real / "train_anno.csv")
    (tmp_path / "train").symlink_to(real / "train")
    found, csv = rows(opened("llava", tmp_path)), rows(opened("csv", tmp_path))
    assert [r.caption for r in found] == [r.caption for r in csv]
    assert [image(r) for r in found] == [image(r) for r in csv]
    assert len(found) == 900 and all(image(r).is_file() for r in found)
    assert all("<image>" in r.turns[0][1] and len(r.turns) == 2 for r in found)


def _images_and_rows(samples):
    rows = [(sample.dataset, sample.index) for sample in samples]
    return {"images": stack_several(samples)[0], "rows": rows}


def test_real_conversations_mixed_with_texts_alone(shared_data, tmp_path):
    """Batches of one modality out of a file that has both and one that has texts alone."""
    real = shared_data / "llava_1k"
    samples = json.loads((real / "train_conversations.json").read_text())
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train").symlink_to(real / "train")
    alone = [
        {"id": s["id"], "conversations": [{**turn, "value": turn["value"].replace("<image>", "")}
                                          for turn in s["conversations"]]}
        for s in samples[:200]
    ]  # fmt: skip
    put(tmp_path / "mixed" / "train.json", samples[:300] + alone[:100])
    put(tmp_path / "texts" / "train.json", alone[100:])
    settings = {
        "data_path": str(tmp_path), "train_name": ["mixed", "texts"], "batch_size": 32,
        "train_type": "modality_grouped", "conversations": "flatten",
        "datasets": {name: {"format": "llava"} for name in ("mixed", "texts")},
    }  # fmt: skip
    plan = make_plan(Config.model_validate({"data": settings}), 2)
    form = Transforms(image_aspect_ratio="pad", resize_bicubic={"size": 32})
    transform = pipeline.build(["resize_bicubic"], form, "transforms.train_transforms")
    ranks = [
        train_batches(
            plan.sources, plan.sampler, transform, _images_and_rows, first_step=0,
            total_steps=plan.total_steps, steps_per_epoch=plan.steps_per_epoch, rank=rank, world=2,
            seed=0, num_workers=0, limits=Limits(text_alone=True),
        )
        for rank in range(2)
    ]  # fmt: skip
    rows_seen, alone_seen = [], 0
    for (_, one, bad), (_, two, _) in zip(*ranks, strict=True):
        assert not bad and (one["images"] is None) == (two["images"] is None)
        rows_seen += one["rows"] + two["rows"]
        alone_seen += (one["images"] is None) * (len(one["rows"]) + len(two["rows"]))
        for batch in (one, two):
            if batch["images"] is not None:
                assert batch["images"].shape == (len(batch["rows"]), 1, 3, 32, 32)
    assert sorted(rows_seen) == [(0, n) for n in range(400)] + [(1, n) for n in range(100)]
    assert alone_seen == 200
