"""Lengths of rows: what Arrow counts is what a loop over the records counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.groups import group_rows
from engine.data.tables import lengths
from engine.data.tables import table as tables
from engine.data.tables.paths import ImageRoot
from engine.data.tables.source import open_rows
from engine.data.tables.table import file_named
from engine.data.tables.values import first_answer
from engine.data.views import Concatenated, JoinedCaptions, OneCaption, Repeated, Subset, pairs_of
from engine.types import Row
from tests.data.formats.folders import folder, opened

TEXT = st.text("aé🙂 ", max_size=6)
SPEAKERS = ("human", "gpt", "human", "gpt", "human")


def talk(start, texts):
    return tuple(zip(SPEAKERS[start:], texts, strict=False))


ROWS = st.builds(
    lambda caption, texts, start, images: Row(
        images=images, caption=caption if not texts else first_answer(talk(start, texts)),
        turns=talk(start, texts),
    ),
    TEXT, st.lists(TEXT, max_size=4), st.integers(0, 1),
    st.sampled_from([(), (file_named("a.png"),), (file_named("a.png"), file_named("b.png"))]),
)  # fmt: skip


def source_of(folder_, rows, **options):
    path = folder_ / "anno.txt"
    path.write_text("x")
    rows = lambda rows=rows: rows  # noqa: E731
    return open_rows("mine", "train", [path], "", rows, cache_dir=folder_, **options)


@given(st.lists(ROWS, min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_as_a_loop_counts_them(tmp_path_factory, rows, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS", batch)
        source = source_of(tmp_path_factory.mktemp("t"), rows)
    of_rows, of_pairs, ends = [], [], []
    answers, pair_answers = [], []
    for row in rows:
        sign = 1 if row.images else -1
        texts = [text for _, text in row.turns] or [row.caption]
        of_rows.append(sign * max(1, sum(map(len, texts))))
        places = pairs_of(row.turns)
        of_pairs += [sign * len(texts[p] + texts[p + 1]) for p in places] or [of_rows[-1]]
        ends.append(len(of_pairs))
        answers.append(len(texts[-1]))
        pair_answers += [len(texts[p + 1]) for p in places] or answers[-1:]
    assert source.column("length").tolist() == of_rows
    assert source.column("pair_ends").tolist() == ends
    assert source.column("pair_length").tolist() == of_pairs
    assert source.column("answer_length").tolist() == answers
    assert source.column("pair_answer_length").tolist() == pair_answers
    for counted in map(source.column, lengths.COLUMNS):
        assert isinstance(counted, np.memmap) and counted.dtype == np.int32


def test_of_views(tmp_path):
    names = ("a", "b", "a", "b", "c")
    rows = [Row(images=(file_named(name),), caption="x" * n) for n, name in enumerate(names, 1)]
    rows.append(Row(caption="alone"))
    source = source_of(tmp_path, rows, images=ImageRoot(tmp_path))
    length = source.column("length")
    assert length.tolist() == [1, 2, 3, 4, 5, -5]
    groups = group_rows(source, tmp_path)
    for name, alone in (("length", -5), ("answer_length", 5)):
        joined = JoinedCaptions(source, groups, " ").column(name)
        assert joined.tolist() == [4, 6, 5, alone]
        both = Concatenated("both", [source, source]).column(name)
        assert both.tolist() == [1, 2, 3, 4, 5, alone] * 2 and both.dtype == np.int32
    assert OneCaption(source, groups).column("length").tolist() == [1, 2, 5, -5]
    assert Repeated(source, 2).column("length").tolist() == length.tolist() * 2
    subset = Subset(source, 3, 0)
    assert subset.column("length").tolist() == [
        -5 if not row.images else len(row.caption) for row in map(subset.__getitem__, range(3))
    ]


def test_of_questions_texts_beside_images_and_classes(tmp_path):
    csv = folder(tmp_path / "csv", "train/a.png")
    (csv / "train_anno.csv").write_text("image,question,answer\na.png,Why?,so|so|no\na.png,Is?,y\n")
    assert opened("csv", csv).column("length").tolist() == [7, 5]  # "Why? so"
    assert opened("csv", csv).column("answer_length").tolist() == [2, 1]
    beside = folder(tmp_path / "beside", "train/a.png", "train/b.png")
    (beside / "train" / "a.txt").write_text("four")
    texts = opened("sidecar", beside)
    assert texts.column("length").tolist() == texts.column("answer_length").tolist() == [4, 1]
    classes = folder(tmp_path / "classes", "train/cat/a.png", "train/horse/b.png")
    named = opened("imagefolder", classes, valid="train")
    assert named.column("length").tolist() == named.column("answer_length").tolist() == [3, 5]
