"""Views: which rows a dataset has, in training and in evaluation."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engine.config import schema
from engine.data.bad_samples import BadRecord
from engine.data.groups import group_rows
from engine.data.permutation import Permutation
from engine.data.reader import Limits, Reader
from engine.data.sources import open_source, row_options
from engine.data.views import (
    Concatenated,
    Draw,
    JoinedCaptions,
    OneCaption,
    Repeated,
    Subset,
    origin,
)
from engine.errors import UserError
from engine.types import BadSample, Row, Sample, Source

CAPTIONS = {"a.jpg": 3, "b.jpg": 1, "c.jpg": 5, "d.jpg": 2}  # of each image
ROWS = [(image, f"{image[0]}{n}") for image, count in CAPTIONS.items() for n in range(count)]


@pytest.fixture
def opened(tmp_path):
    """Opens the dataset 'mine' with some options: images with several captions each."""
    for split in ("train", "valid"):
        (tmp_path / "mine" / split).mkdir(parents=True)
        lines = [f"{image},{image},{caption}" for image, caption in ROWS]
        text = "\n".join(["image,image_id,caption", *lines]) + "\n"
        (tmp_path / "mine" / f"{split}_anno.csv").write_text(text)

    def open_with(split="train", **options):
        data = schema.Data(data_path=str(tmp_path), datasets={"mine": {"format": "csv", **options}})
        return open_source("mine", split, data, key="data.train_name")

    return open_with


def shown(source, epoch, seed=0):
    """(image, caption) of every row in an epoch."""
    places = [origin(source, row, Draw(seed, epoch)) for row in range(len(source))]
    records = [base[row] for base, row in places]
    return [(record.image_id, record.caption) for record in records]


def assert_consistent(source):
    """Columns and captions say what the rows say."""
    records = [source[row] for row in range(len(source))]
    assert [record.caption for record in records] == list(source.captions())
    for name in ("image_id", "caption_id"):
        codes = source.column(name)
        assert codes.dtype == np.int64
        ids = [getattr(record, name) for record in records]
        assert len(codes) == len(ids)
        assert len(set(zip(codes.tolist(), ids, strict=True))) == len(set(ids)) == len(set(codes))


def test_all_captions_are_the_default(opened):
    source = opened()
    assert [(r.image_id, r.caption) for r in map(source.__getitem__, range(11))] == ROWS
    assert_consistent(source)


def test_one_caption_an_image_and_epoch(opened):
    source = opened(captions="random")
    assert len(source) == 4
    for epoch in range(20):
        assert [image for image, _ in shown(source, epoch)] == list(CAPTIONS)
    assert shown(source, 3) == shown(opened(captions="random"), 3)
    assert [shown(source, e) for e in range(5)] != [shown(source, e, seed=1) for e in range(5)]


def test_captions_of_an_image_take_turns(opened):
    source = opened(captions="random")
    for image, (name, count) in enumerate(CAPTIONS.items()):
        for turn in range(4):
            epochs = range(turn * count, (turn + 1) * count)
            found = [shown(source, epoch)[image][1] for epoch in epochs]
            assert sorted(found) == [caption for of, caption in ROWS if of == name]


def test_every_caption_of_an_image_is_as_likely_first():
    class Five:
        name, split, classes = "five", "train", None
        rows = np.arange(10_000).reshape(-1, 5)
        __getitem__ = rows.__getitem__

        def __len__(self):
            return 2000

    view = OneCaption(Five(), Five())
    for epoch in (0, 7):
        places = [view.at(image, Draw(3, epoch))[1] % 5 for image in range(2000)]
        counts = Counter(places)
        assert all(abs(counts[n] - 400) < 80 for n in range(5))  # 4.5 standard deviations
    again = [view.at(image, Draw(3, 1))[1] % 5 for image in range(2000)]
    first = [view.at(image, Draw(3, 0))[1] % 5 for image in range(2000)]
    steps = Counter((b - a) % 5 for a, b in zip(first, again, strict=True))
    assert steps[0] == 0 and min(steps[n] for n in range(1, 5)) > 250


def test_one_caption_without_a_draw_is_the_first(opened):
    source = opened(captions="random")
    assert [source[image].caption for image in range(4)] == ["a0", "b0", "c0", "d0"]
    assert source.column("caption_id").tolist() == [0, 3, 4, 9]
    assert list(source.captions()) == [caption for _, caption in ROWS]  # all that may be shown


def test_joined_captions(opened):
    source = opened(captions="joined")
    assert [source[image].caption for image in range(4)] == [
        "a0 a1 a2",
        "b0",
        "c0 c1 c2 c3 c4",
        "d0 d1",
    ]
    assert_consistent(source)
    assert opened(captions="joined", caption_separator=" . ")[3].caption == "d0 . d1"


def test_joined_captions_leave_out_rows_that_cannot_be_used(opened, tmp_path):
    """An image is lost with its last row alone, and then for the reason of the first."""
    captions = {"a.jpg": ["", "a1", "a2"], "b.jpg": ["", " "]}
    lines = [f"{image},{image},{text}" for image, texts in captions.items() for text in texts]
    (tmp_path / "mine" / "train_anno.csv").write_text(
        "\n".join(["image,image_id,caption", *lines]) + "\n"
    )
    source = opened(captions="joined")
    assert source[0].caption == "a1 a2"
    with pytest.raises(BadSample, match="no caption: row 4"):
        source[1]
    assert list(source.captions()) == ["a1 a2", ""]


def test_joined_rows_keep_their_conversations_answers_and_labels(tmp_path):
    class Asked(Rows):
        def __getitem__(self, index):
            turns = (("human", f"q{index}"), ("gpt", f"a{index}"))
            return replace(
                super().__getitem__(index), turns=turns, answers=(f"a{index}",), labels=("x", "y")
            )

        def column(self, name):
            return np.zeros(self.length, np.int64)

    source = Asked("x", 2)
    record = JoinedCaptions(source, group_rows(source, tmp_path), " ")[0]
    assert record.caption == "x 0 x 1"
    assert [text for _, text in record.turns] == ["q0", "a0", "q1", "a1"]
    assert (record.answers, record.labels) == (("a0", "a1"), ("x", "y"))


def test_evaluation_has_all_rows_but_for_joined_captions(opened):
    options = {"captions": "random", "cap": 2, "repeat": 3, "length": 11}
    assert len(opened("valid", **options)) == 11
    assert len(opened("train", **options)) == 6
    assert opened("valid", captions="joined")[3].caption == "d0 d1"


def test_a_cap_is_a_fixed_random_choice(opened):
    source = opened(cap=5)
    rows = [source[row].caption for row in range(5)]
    assert len(set(rows)) == 5 == len(source)
    assert_consistent(source)
    assert rows == [opened(cap=5)[row].caption for row in range(5)]
    assert sorted(rows) != sorted(opened(cap=5, cap_seed=1).captions())
    assert sorted(opened(cap=11).captions()) == sorted(opened(cap=99).captions())
    assert len(opened(cap=99)) == 11
    with pytest.raises(IndexError):
        source[5]


def test_a_cap_chooses_every_row_as_often():
    source = Rows("base", 20)
    chosen = Counter(
        Subset(source, 5, seed).at(row, None)[1] for seed in range(400) for row in range(5)
    )
    assert all(abs(chosen[row] - 100) < 45 for row in range(20))


def test_a_cap_of_images_with_one_caption_each(opened):
    source = opened(captions="random", cap=2)
    images = {image for image, _ in shown(source, 0)}
    assert len(source) == len(images) == 2
    assert {image for image, _ in shown(source, 4)} == images
    assert sorted(source.captions()) == [c for image, c in ROWS if image in images]


def test_rows_repeated_within_an_epoch(opened):
    source = opened(repeat=3)
    assert len(source) == 33
    assert Counter(shown(source, 0)) == Counter(ROWS * 3)
    records = [source[row].caption for row in range(33)]
    assert records == list(source.captions()) == [caption for _, caption in ROWS] * 3
    assert source.column("image_id").tolist() == opened().column("image_id").tolist() * 3
    with pytest.raises(IndexError):
        source[33]


def test_repeats_show_the_next_captions(opened):
    source = opened(captions="random", repeat=5)
    for epoch in range(3):
        of_c = [caption for image, caption in shown(source, epoch) if image == "c.jpg"]
        assert sorted(of_c) == ["c0", "c1", "c2", "c3", "c4"]


class Rows(Source):
    """Plain rows, some of which cannot be used."""

    split = "train"

    def __init__(self, name, length, bad=(), classes=None):
        self.name, self.length, self.bad = name, length, bad
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        if index in self.bad:
            raise BadSample("no caption", f"row {index}")
        return Row(f"{self.name}{index}", (), f"{self.name} {index}", str(index), str(index))

    def column(self, name):
        return np.where(np.isin(np.arange(self.length), list(self.bad)), -1, np.arange(self.length))

    def captions(self):
        return (f"{self.name} {index}" for index in range(self.length))


def test_concatenated_parts_lie_end_to_end():
    source = Concatenated("both", [Rows("x", 3), Rows("y", 4, bad={1})])
    assert len(source) == 7
    assert [source[row].key for row in (0, 2, 3, 6)] == ["x0", "x2", "y0", "y3"]
    assert source.column("image_id").tolist() == [0, 1, 2, 3, -1, 5, 6]
    assert list(source.captions()) == ["x 0", "x 1", "x 2", "y 0", "y 1", "y 2", "y 3"]
    assert origin(source, 5) == (source.parts[1], 2)
    for row in (-1, 7):
        with pytest.raises(IndexError):
            source[row]


def test_classes_are_those_of_the_dataset():
    classes = ["cat", "dog"]
    views = [
        Subset(Rows("x", 9, classes=classes), 3, 0),
        Repeated(Rows("x", 9, classes=classes), 2),
    ]
    assert all(getattr(view, "classes", None) == classes for view in views)
    assert getattr(Subset(Rows("x", 9), 3, 0), "classes", None) is None


def test_views_of_views_and_their_captions(opened, monkeypatch):
    """Captions come in the order of the rows, however little is in memory at once."""
    for block in (1, 3, 1000):
        monkeypatch.setattr("engine.data.views.BLOCK", block)
        for options in ({"cap": 7}, {"captions": "joined"}, {"captions": "joined", "cap": 3}):
            source = opened(repeat=2, **options)
            assert list(source.captions()) == [source[row].caption for row in range(len(source))]
        assert sorted(opened(captions="random").captions()) == sorted(c for _, c in ROWS)


def test_captions_of_rows_in_any_order(opened):
    order = np.array([3, 0, 3, 1])
    for options in ({}, {"captions": "joined"}, {"cap": 4}, {"repeat": 2}):
        source = opened(**options)
        assert list(source.captions_of(order)) == [source[row].caption for row in order.tolist()]
    rows = Rows("x", 4, bad={1})
    assert list(rows.captions_of(order)) == ["x 3", "x 0", "x 3", ""]
    both = Concatenated("both", [rows, Rows("y", 4)])
    assert list(both.captions_of(np.array([7, 0]))) == ["y 3", "x 0"]


def test_workers_are_sent_the_path_of_the_groups(opened):
    source = opened(captions="random")
    pickled = pickle.dumps(source.groups)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[2].tolist() == [4, 5, 6, 7, 8]


def test_reading_goes_to_the_row_itself(opened):
    """A bad sample is named as its dataset has it, and each repeat has its own augmentation."""
    base = Rows("x", 10, bad=range(10))
    reader = Reader(
        [Repeated(Subset(base, 4, 0), 2)], lambda image: image, 1, Limits(text_alone=True)
    )
    chosen = Permutation(10, 0, 4)(np.arange(4)).tolist()
    for row in range(8):
        of = chosen[row % 4]
        assert reader.read(0, 0, 0, row) == BadRecord(
            0, "x", of, f"row {of}", "no caption", f"row {of}"
        )
    reader = Reader([Repeated(Rows("x", 4), 2)], lambda image: image, 1, Limits(text_alone=True))
    samples = [reader.read(0, 0, 0, row) for row in range(8)]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.row.caption for sample in samples] == [f"x {row % 4}" for row in range(8)]
    assert [sample.index for sample in samples] == list(range(8))
    assert len({sample.seed for sample in samples}) == 8


def test_a_reader_without_a_seed_shows_first_captions(opened, monkeypatch):
    source = opened(captions="random")
    monkeypatch.setattr("engine.data.reader.read_image", lambda image: b"")
    monkeypatch.setattr(Reader, "_image", lambda *_: None)
    drawn = Reader([source], lambda image: image, 0, Limits(text_alone=True))
    plain = Reader([source], lambda image: image, None, Limits(text_alone=True))
    for epoch in range(3):
        texts = [drawn.read(0, epoch, 0, row).row.caption for row in range(4)]
        assert texts == [caption for _, caption in shown(source, epoch)]
        first = [plain.read(0, epoch, 0, row).row.caption for row in range(4)]
        assert first == ["a0", "b0", "c0", "d0"]


@pytest.mark.parametrize(
    ("options", "message", "key"),
    [
        ({"captions": "some"}, "captions: .*'all', 'random' or 'joined'", "captions"),
        ({"cap": 0}, "cap: needs a number above 0", "cap"),
        ({"repeat": 0}, "repeat: needs a number above 0", "repeat"),
        ({"repeats": 2}, "has no 'repeats'; did you mean 'repeat'", "repeats"),
        ({"length": 12}, "has 11 training rows, .* given as 12", "length"),
        ({"caption_separator": "|"}, "without captions: joined", "caption_separator"),
        ({"cap_seed": 3}, "without cap: N", "cap_seed"),
    ],
)
def test_wrong_options(opened, options, message, key):
    with pytest.raises(UserError, match=message) as caught:
        opened(**options)
    assert caught.value.key == f"data.datasets.mine.{key}"


def test_options_that_the_order_hangs_on():
    def options_of(**options):
        data = schema.Data(datasets={"mine": {"format": "csv", "root": "x", **options}})
        return row_options("mine", data)

    assert options_of() == options_of(captions="all", repeat=1, length=7) == {}
    assert options_of(cap=3, captions="random") == {"cap": 3, "captions": "random"}
    data = schema.Data(
        datasets={
            "both": {"format": "concat", "parts": ["shapes", "mine"], "repeat": 2},
            "mine": {"format": "csv", "cap": 3},
        }
    )
    parts = {"shapes": {}, "mine": {"cap": 3}}
    assert row_options("both", data) == {"repeat": 2, "parts": parts}


def test_grouped_rows_need_not_stand_together(opened, tmp_path):
    names = ["b", "a", "b", "c", "a"]
    text = "image,caption\n" + "".join(f"{name}.jpg,{name}{n}\n" for n, name in enumerate(names))
    (tmp_path / "mine" / "train_anno.csv").write_text(text)
    source = opened(captions="joined")
    assert [source[image].caption for image in range(3)] == ["b0 b2", "a1 a4", "c3"]
    assert_consistent(source)
    assert all(a < b for a, b in pairwise(source.groups.firsts().tolist()))


def test_shards_of_views():
    """How many rows of a view lie in each shard: for samplers that keep to some at a time."""

    class Sharded(Rows):
        def __init__(self, name, blocks):
            super().__init__(name, sum(blocks))
            self.own = np.array(blocks)

        @property
        def blocks(self):
            return self.own

    class Pairs:
        """Two rows an image, one image over the border of the first two shards."""

        def firsts(self):
            return np.arange(0, 10, 2)

        def __len__(self):
            return 5

    shards = Sharded("x", [3, 5, 2])
    assert OneCaption(shards, Pairs()).blocks.tolist() == [2, 2, 1]
    assert JoinedCaptions(shards, Pairs(), " ").blocks.tolist() == [2, 2, 1]
    assert Repeated(shards, 2).blocks.tolist() == [3, 5, 2, 3, 5, 2]
    assert Repeated(OneCaption(shards, Pairs()), 2).blocks.tolist() == [2, 2, 1] * 2
    assert Concatenated("both", [shards, Sharded("y", [4])]).blocks.tolist() == [3, 5, 2, 4]
    assert Concatenated("both", [shards, Rows("y", 4)]).blocks is None
    assert Subset(shards, 4, 0).blocks is None
    assert Repeated(Rows("y", 4), 2).blocks is OneCaption(Rows("y", 10), Pairs()).blocks is None
