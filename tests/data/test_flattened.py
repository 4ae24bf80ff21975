"""Conversations question by question."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.config.schema import Data
from engine.data.sources import open_source
from engine.data.views import Flattened, one_pair, pairs_of
from engine.errors import UserError
from engine.types import BadSample, Row
from tests.data.formats.folders import folder, put, rows
from tests.tools.pack import packing

MARK = "<image>"


def talk(*texts, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return tuple((speakers[n % 2], text) for n, text in enumerate(texts))


def entry(turns, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


SAMPLES = [
    entry(talk(f"{MARK}\nA?", "a", "B?", "b", "C?", "c"), id="x", image="1.png"),
    entry(talk("D?", "d", "E?", "e"), id="text"),
    entry(talk("F?", "f", "G?"), id="open", image="2.png"),
    entry(talk("hello", f"H?{MARK}", "h", first="gpt"), id="greeted", image="2.png"),
    entry([("human", "I?"), ("human", "J?")], id="broken", image="1.png"),
    entry(
        talk(f"{MARK} K?", "k", "L?", "l", f"{MARK}M?", "m", "N?", "n"),
        id="two",
        image=["1.png", "2.png"],
    ),
]
PAIRS = [
    (f"{MARK}\nA?", "a"), (f"{MARK}\nB?", "b"), (f"{MARK}\nC?", "c"), ("D?", "d"), ("E?", "e"),
    ("F?", "f"), (f"H?{MARK}", "h"), None, (f"{MARK} K?", "k"), (f"{MARK}\nL?", "l"),
    (f"{MARK}M?", "m"), (f"{MARK}\n{MARK}\nN?", "n"),
]  # fmt: skip
IMAGES = [["1.png"]] * 3 + [[]] * 2 + [["2.png"]] * 2 + [None, ["1.png"], ["1.png"], ["2.png"]]
IMAGES.append(["1.png", "2.png"])


@pytest.fixture
def root(tmp_path):
    folder(tmp_path / "mine", "train/1.png", "train/2.png")
    put(tmp_path / "mine" / "train.json", SAMPLES)
    return tmp_path


def opened(folder, conversations="flatten", **options):
    own = {"format": "llava", **options}
    if own["format"] == "llava":
        own["several_images"] = "all"
    data = Data(data_path=str(folder), datasets={"mine": own}, conversations=conversations)
    return open_source("mine", "train", data, key="data.train_name")


def test_every_question_is_a_row(root):
    source = opened(root)
    found = rows(source)
    assert isinstance(source, Flattened) and len(found) == len(PAIRS)
    for record, pair, images in zip(found, PAIRS, IMAGES, strict=True):
        if pair is None:
            assert record == "malformed"
            continue
        assert record.turns == (("human", pair[0]), ("gpt", pair[1]))
        assert record.caption == pair[1]
        names = record.images
        assert [path.name for path in names] == images
    assert [r.caption_id for r in found[:5]] == ["x#0", "x#1", "x#2", "text#0", "text#1"]
    assert list(source.captions()) == [pair[1] if pair else "" for pair in PAIRS]
    assert rows(pickle.loads(pickle.dumps(source))) == found
    with pytest.raises(IndexError):
        source[len(source)]


def test_columns_are_those_of_the_rows(root):
    source, whole = opened(root), opened(root, "turns")
    assert len(whole) == len(SAMPLES) and whole[0].turns[2] == ("human", "B?")
    rows_of_pairs = np.repeat(np.arange(6), [3, 2, 1, 1, 1, 4])
    assert np.array_equal(source.column("image_id"), whole.column("image_id")[rows_of_pairs])
    assert len(set(source.column("caption_id").tolist())) == len(PAIRS)
    lengths = source.column("length")  # of what the file has: a mark has seven characters
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [11, 3, 3, -3, -3, 3, 10, -1, 11, 3, 10, 3]
    assert whole.column("length").tolist() == [17, -6, 5, 15, -1, 27]
    assert source.column("answer_length").tolist() == [1] * 7 + [0] + [1] * 4
    assert whole.column("answer_length").tolist() == [1, 1, 2, 1, 0, 1]  # of the last turn


def test_options_of_rows_come_after(root):
    assert len(opened(root, repeat=2)) == 2 * len(PAIRS)
    assert len(opened(root, cap=4)) == 4
    joined = opened(root, captions="joined")
    assert joined[0].turns[:4] == (
        ("human", f"{MARK}\nA?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")
    )  # fmt: skip


def test_shards_are_flattened_alike(root):
    put(root / "mine" / "train.json", SAMPLES[:4])  # a shard holds one image of a sample
    packing.run(
        root / "mine", root / "packed", "--format=llava", "--to=webdataset", "--shard-size=2"
    )
    plain = opened(root)
    packed = opened(root, format="webdataset", root="packed")
    assert [r.turns for r in rows(packed)] == [r.turns for r in rows(plain)]
    for name in ("length", "answer_length"):
        for one, other in ((packed, plain), (packed.source, plain.source)):
            assert one.column(name).tolist() == other.column(name).tolist()
    assert list(packed.captions()) == list(plain.captions())
    assert packed.blocks.tolist() == [5, 2]


def test_rows_that_are_no_conversations_stay(tmp_path):
    folder(tmp_path / "mine", "train/1.png")
    (tmp_path / "mine" / "train_anno.csv").write_text("image,question,answer\n1.png,Q?,a\n")
    source = opened(tmp_path, format="csv")
    assert not isinstance(source, Flattened)
    assert source[0].turns == (("human", "Q?"), ("gpt", "a"))


def test_streams_cannot_be_flattened(tmp_path):
    options = {"format": "webdataset", "train": "https://host/{000..009}.tar", "length": 9}
    with pytest.raises(UserError, match="question by question") as error:
        opened(tmp_path, **options)
    assert error.value.key == "data.conversations"


def test_marks_that_do_not_fit_the_images_are_left_to_the_task():
    turns = talk(f"{MARK}{MARK} A?", "a", "B?", "b")
    record = Row("k", (Path("1"),), "a", "i", "c", turns=turns)
    assert [one_pair(record, n).turns[0][1] for n in range(2)] == [f"{MARK}{MARK} A?", "B?"]
    assert all(one_pair(record, n).images == (Path("1"),) for n in range(2))
    assert pairs_of(()) == [] and pairs_of(talk("only")) == []
    assert one_pair(Row("k", (), "a", "i", "c"), 0).caption == "a"


def test_a_conversation_whose_speakers_take_no_turns(root):
    with pytest.raises(BadSample, match=r"entry 5: turn 2 is human's, as the one before it is"):
        opened(root, "turns")[4]
