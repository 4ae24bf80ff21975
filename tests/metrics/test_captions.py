"""Caption scores against known values, with and without Java, and by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pycocoevalcap")

from engine.errors import UserError
from engine.metrics import captions
from engine.metrics import captions_java as java
from engine.metrics.captions import caption_scores, diversity
from engine.metrics.captions_files import read

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
GIVEN = {"a": "A dog runs.", 7: ""}
REFERENCES = {7: ["A cat sits, here."], "a": ["A dog runs.", "The dog isn't slow."]}
needs_java = pytest.mark.skipif(bool(java.missing_java()), reason="no Java")


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")


def known(shared_data, name, **options):
    found = read(shared_data / "metrics" / f"{name}.json")
    scores = caption_scores(found.candidates, found.references, **options)
    text = (shared_data / "metrics" / f"{name}.expected.json").read_text(encoding="utf8")
    return scores, json.loads(text)


def agree(scores, wanted, names):
    for name in names:
        assert scores.corpus[name] == pytest.approx(wanted["recomputed"][name], abs=1e-4), name
    for key, values in wanted["per_item"].items():
        assert {n: scores.per_item[key][n] for n in names} == pytest.approx(
            {n: values[n] for n in names}, abs=1e-4
        ), key


@pytest.mark.parametrize(
    "name", ["magic_flickr30k_magic", "clipscore_good", "clipscore_bad", "nlg_eval_example"]
)
def test_known_values_without_java(shared_data, no_java, name):
    scores, wanted = known(shared_data, name)
    assert scores.tokenizer == "python"
    assert scores.left_out == dict.fromkeys(("METEOR", "SPICE"), "Java is not on the PATH")
    agree(scores, wanted, NAMES)


@needs_java
@pytest.mark.slow  # METEOR takes its time to start
@pytest.mark.parametrize("name", ["clipscore_good", "clipscore_bad", "nlg_eval_example"])
def test_known_values_with_java(shared_data, name):
    scores, wanted = known(shared_data, name, without=["SPICE"])
    assert scores.tokenizer == "java"
    assert scores.left_out == {"SPICE": "not wanted"}
    agree(scores, wanted, [*NAMES, "METEOR"])


@needs_java
@pytest.mark.slow
def test_both_tokenizers_give_the_same_scores(shared_data):
    ours, wanted = known(shared_data, "magic_flickr30k_magic", tokenizer="python")
    theirs, _ = known(shared_data, "magic_flickr30k_magic", tokenizer="java")
    agree(ours, wanted, [*NAMES, "METEOR"])
    assert ours.corpus == theirs.corpus
    assert ours.per_item == theirs.per_item


@needs_java
def test_the_java_tokenizer_is_taken_where_it_is(shared_data):
    scores, wanted = known(shared_data, "clipscore_bad", without=["METEOR", "SPICE"])
    assert scores.tokenizer == "java"
    agree(scores, wanted, NAMES)


def test_ids_keep_their_kind_and_order(no_java):
    scores = caption_scores(GIVEN, REFERENCES)
    assert list(scores.per_item) == ["a", 7]
    assert scores.per_item["a"]["ROUGE_L"] == 1
    assert scores.per_item["a"]["Bleu_3"] == pytest.approx(1)
    assert scores.corpus["CIDEr"] == scores.corpus["CIDEr-D"]
    assert scores.per_item[7] == pytest.approx(dict.fromkeys(scores.per_item[7], 0), abs=1e-5)


@needs_java
@pytest.mark.slow
def test_empty_candidates_with_java():
    scores = caption_scores(GIVEN, REFERENCES, without=["SPICE"])
    assert scores.per_item["a"]["METEOR"] == 1
    assert scores.per_item[7]["METEOR"] == 0


def test_no_words_at_all(no_java):
    scores = caption_scores({1: "", 2: "?"}, {1: ["..."], 2: ["!"]})
    assert scores.corpus["CIDEr"] == 0
    assert scores.corpus["mean_length"] == 0
    assert scores.per_item[1]["Bleu_1"] == pytest.approx(0, abs=1e-5)


def test_diversity_by_hand():
    values = diversity(["a dog runs", "a dog sits", ""])
    assert values == pytest.approx(
        {
            "distinct_1": 4 / 6, "distinct_2": 3 / 4, "distinct_3": 1, "distinct_4": 0,
            "vocabulary": 4, "mean_length": 2,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({1: "a"}, {}, "1 has no reference"),
        ({}, {1: ["a"]}, "no captions"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "2 has no candidate"),
        ({1: "a"}, {1: []}, "1 has no reference"),
    ],
)
def test_ids_that_do_not_match(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(candidates, references)


def test_what_can_be_left_out():
    with pytest.raises(ValueError, match="METEOR, SPICE, not CIDEr"):
        caption_scores(GIVEN, REFERENCES, without=["CIDEr"])


def test_the_java_tokenizer_when_there_is_no_java(no_java):
    with pytest.raises(UserError, match="Java is not on the PATH"):
        caption_scores(GIVEN, REFERENCES, tokenizer="java")


def test_without_pycocoevalcap(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        caption_scores(GIVEN, REFERENCES)


def test_the_command(tmp_path, no_java, capsys):
    item = {"id": 3, "references": ["A dog."], "candidate": "a dog"}
    path = tmp_path / "items.json"
    path.write_text(json.dumps([item]), encoding="utf8")
    assert captions.main([str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overall"]["Bleu_1"] == pytest.approx(1)
    assert told["per_item"]["3"]["ROUGE_L"] == 1
    assert (told["items"], told["references"], told["tokenizer"]) == (1, 1, "python")
    assert set(told["left_out"]) == {"METEOR", "SPICE"}


def test_the_command_on_coco_results(tmp_path, no_java, capsys):
    results, annotations = tmp_path / "results.json", tmp_path / "annotations.json"
    results.write_text('[{"image_id": 5, "caption": "a dog"}]', encoding="utf8")
    rows = [{"image_id": i, "id": i, "caption": "A dog."} for i in (5, 6)]
    annotations.write_text(json.dumps({"images": [], "annotations": rows}), encoding="utf8")
    assert captions.main([str(results), "--references", str(annotations)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overall"]["Bleu_2"] == pytest.approx(1)
    assert told["images_without_candidate"] == 1


def test_a_bad_file_ends_with_one_message_and_2(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{", encoding="utf8")
    done = subprocess.run(
        [sys.executable, "-m", "engine.metrics.captions", str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{path} is not JSON")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
