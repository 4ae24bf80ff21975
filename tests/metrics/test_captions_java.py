"""How Java programs are called and how they fail, mostly with a stand-in for ``java``."""

import sys

import pytest

pytest.importorskip("pycocoevalcap")

from engine.metrics import captions_java as java
from engine.metrics.captions import caption_scores

REFERENCES = {"a": ["a dog"], "b": ["a cat", "one cat"]}
CANDIDATES = {"a": ["a dog"], "b": [""]}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a Python script of the given text in the place of java."""

    def place(text: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\nimport json, sys\n{text}\n", encoding="utf8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return place


@pytest.mark.skipif(bool(java.missing_java()), reason="no Java")
def test_the_reference_is_called_as_its_package_calls_it():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = ["A dog (brown), isn't it?", "", "“café” at No. 5", ""]
    theirs = PTBTokenizer().tokenize({n: [{"caption": line}] for n, line in enumerate(lines)})
    # the package loses captions that are empty at the end
    assert java.tokenize(lines)[: len(theirs)] == [tokens for (tokens,) in theirs.values()]
    assert java.tokenize(lines)[3] == ""


def test_a_java_that_fails_is_told_and_done_without(stand_in):
    stand_in("sys.stderr.write('no runtime\\n'); sys.exit(3)")
    scores = caption_scores({1: "a dog"}, {1: ["A dog."]})
    assert scores.tokenizer == "python"
    assert scores.left_out["java tokenizer"] == "java ended with code 3: no runtime"
    assert scores.left_out["METEOR"].startswith("METEOR failed")
    assert set(scores.left_out) == {"java tokenizer", "METEOR", "SPICE"}
    assert scores.corpus["Bleu_1"] == pytest.approx(1)


def test_a_tokenizer_that_writes_too_many_lines(stand_in):
    stand_in("print('a\\nb\\nc')")
    with pytest.raises(java.JavaError, match="4 lines for 1 captions"):
        java.tokenize(["a"])


def test_spice_without_its_models(stand_in, monkeypatch):
    stand_in("")
    monkeypatch.setattr(java, "_SPICE_NEEDS", ("models-that-are-not-there.jar",))
    with pytest.raises(java.JavaError, match=r"no models-that-are-not-there.*get_stanford_models"):
        java.spice(REFERENCES, CANDIDATES)


def test_spice_reads_its_program(stand_in, monkeypatch):
    monkeypatch.setattr(java, "_SPICE_NEEDS", ())
    stand_in(
        "given = json.load(open(sys.argv[5]))\n"
        "assert given[1] == {'image_id': 1, 'test': '', 'refs': ['a cat', 'one cat']}\n"
        "score = {0: 0.5, 1: None}\n"
        "told = [{'image_id': i, 'scores': {'All': {'f': score[i]}}} for i in (1, 0)]\n"
        "json.dump(told, open(sys.argv[sys.argv.index('-out') + 1], 'w'))"
    )
    assert java.spice(REFERENCES, CANDIDATES) == (0.25, [0.5, 0.0])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "wrote no result"),
        ("open(sys.argv[sys.argv.index('-out') + 1], 'w').write('[]')", "scored 0 of 2"),
        ("sys.exit(1)", "code 1: no word"),
    ],
)
def test_a_spice_that_fails(stand_in, monkeypatch, program, message):
    monkeypatch.setattr(java, "_SPICE_NEEDS", ())
    stand_in(program)
    with pytest.raises(java.JavaError, match=message):
        java.spice(REFERENCES, CANDIDATES)
