"""Prompts of templates, against texts written out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.data.text.templates import Template, template, templates
from engine.errors import UserError
from engine.types import BadSample, Row, Sample

KEY = "data.prompt.template"
IMAGE = torch.zeros(3, 2, 2, dtype=torch.uint8)
TALK = (
    ("human", "What is it?\n<image>"), ("gpt", " A dog. "), ("human", "Sure?"), ("gpt", "Yes."),
)  # fmt: skip


def sample(turns=(), text="a dog runs", images=1, seed=5) -> Sample:
    row = Row("k", (b"",) * images, text, "i", "c", turns=tuple(turns))
    return Sample(row, (IMAGE,) * images, 0, 0, seed)


def of(name: str, instruction: str = "") -> Template:
    return template(name, key=KEY, instruction=instruction)


V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
PROMPTS = [
    ("t5_v1", TALK[:2], 1, V1 + "USER: <image>\nWhat is it? ASSISTANT: ", "A dog."),
    (
        "t5_v1", TALK, 1,
        V1 + "USER: <image>\nWhat is it? ASSISTANT: A dog. USER: Sure? ASSISTANT: ", "Yes.",
    ),
    ("t5_v1", TALK[2:], 0, V1 + "USER: Sure? ASSISTANT: ", "Yes."),
    ("t5_v1", TALK[2:], 2, V1 + "USER: <image>\n<image>\nSure? ASSISTANT: ", "Yes."),
    (
        "t5_v1", (("human", "Is <image> like <image>?"), ("gpt", "no")), 2,
        V1 + "USER: Is <image> like <image>? ASSISTANT: ", "no",
    ),
    (
        "t5_v1",
        (("human", "A <image>?"), ("gpt", "<image> a"), ("human", "<image> B?"), ("gpt", "b")), 2,
        V1 + "USER: <image>\nA ? ASSISTANT: a USER: <image>\nB? ASSISTANT: ", "b",
    ),
    ("t5_v1", (), 1, V1 + "USER: <image>\nsay ASSISTANT: ", "a dog runs"),
    ("t5_plain", TALK, 1, "<image>", "a dog runs"),
    ("t5_plain", (), 2, "<image><image>", "a dog runs"),
    ("vqa_plain", TALK[2:], 1, "<image>\nQuestion: Sure? Short answer: ", "Yes."),
    (
        "instruction_answer", TALK[2:], 1,
        "<image>\n##Instruction: say ##Question: Sure? ##Answer: ", "Yes.",
    ),
    ("Q {question} A ", TALK[2:], 0, "Q Sure? A ", "Yes."),
    # images and the instruction come once, with the first turn
    (
        "human_gpt", (*TALK[2:], *TALK[2:]), 1,
        "<image>\n##human: say Sure? ##gpt: Yes. ##human: Sure? ##gpt: ", "Yes.",
    ),
    (
        "vqa_plain", (*TALK[2:], *TALK[2:]), 1,
        "<image>\nQuestion: Sure? Short answer: Yes. Question: Sure? Short answer: ", "Yes.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "turns", "images", "prompt", "learned"), PROMPTS)
def test_prompts_and_what_is_learned(name, turns, images, prompt, learned) -> None:
    found, row = of(name, "say"), sample(turns, images=images)
    assert found.prompt(row) == prompt
    assert found.learned(row) == learned
    unmarked = found.prompt(row, marks=False)
    assert "<image>" not in unmarked
    assert "".join(unmarked.split()) == "".join(prompt.replace("<image>", "").split())


def test_a_question_is_asked_as_a_sample_of_it_is() -> None:
    for name in ("t5_v1", "vqa_plain", "instruction_answer", "t5_plain"):
        for images in range(3):
            found = of(name, "say")
            want = found.prompt(sample((("human", "Why?"), ("gpt", "x")), images=images))
            assert found.question("Why?", images) == want


def test_a_conversation_without_its_last_answer_has_the_same_prompt() -> None:
    found = of("t5_v1")
    assert found.prompt(sample(TALK[:3])) == found.prompt(sample(TALK))


@pytest.mark.parametrize(
    ("turns", "images", "told"),
    [
        (TALK, 0, "image count: 1 <image> in the text, 0 given"),
        (TALK, 2, "image count: 1 <image> in the text, 2 given"),
        ((TALK[0], TALK[2], TALK[3]), 1, "malformed: turn 2: human speaks after human"),
        ((*TALK[:2], TALK[1]), 1, "malformed: turn 3: gpt speaks after gpt"),
        (TALK[1:], 1, "malformed: turn 1: gpt speaks first"),
    ],
)
@pytest.mark.parametrize("name", ["t5_v1", "t5_plain"])
def test_broken_conversations_are_bad_samples(name, turns, images, told) -> None:
    with pytest.raises(BadSample) as caught:
        of(name).prompt(sample(turns, images=images))
    assert str(caught.value) == told


def test_a_caption_is_cut_at_any_character() -> None:
    found, places = of("t5_plain_split_text"), set()
    for seed in range(200):
        row = sample(text=" a dog  runs ", seed=seed)
        prompt, learned = found.prompt(row), found.learned(row)
        assert prompt.startswith("<image>")
        head = prompt.removeprefix("<image>")
        assert head + learned == "a dog runs"
        places.add(len(head))
    assert places == set(range(1, 10))
    still = replace(sample(), seed=None)
    assert found.prompt(still) == found.prompt(still) == "<image>a dog"
    record = Row("k", (Path("x"),), "a dog runs", "i", "c")
    assert (found.prompt(record), found.learned(record)) == ("<image>", "a dog runs")
    assert found.learned(sample(text="x")) == "x"


def test_values_are_not_read_as_templates() -> None:
    odd = "{caption} [x] {images}"
    assert of("Q: {question}").prompt(sample((("human", odd),), images=0)) == f"Q: {odd}"


# --- files


def test_a_file_of_ones_own(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("short: {input: 'Q {question} A ', after: ' | ', system: 'S '}\n")
    for name in (str(path), f"{path}#short"):
        assert of(name).prompt(sample(TALK, images=1)) == (
            "S <image>\nQ What is it? A A dog. | Q Sure? A "
        )
    path.write_text("a: {input: a}\nb: {input: b}\n")
    templates.cache_clear()
    assert of(f"{path}#b").alone("") == "b"
    with pytest.raises(UserError, match="holds 2 templates and none is chosen"):
        of(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plane", "no prompt template is called 'plane'; did you mean 'plain'"),
        ("{instruktion}: ", "has the field {instruktion}; fields of input are {images}"),
        ("{instruction} {}", r"has the field {}"),
        ("{the instruction}", "has the field {the instruction}"),
        ("{caption}", "has the field {caption}"),
        ("nowhere.yaml", "cannot read the prompt templates nowhere.yaml"),
        ("x: {input: a, targt: b}", "unknown key 'targt'; did you mean 'target'"),
        ("x: {input: a, instruction: b}", "unknown key 'instruction'"),
        ("x: {input: 3}", "input: needs text (quoted where it looks like a number), not 3"),
        ("x: {target: a}", "input: the key is missing"),
        ("x: {input: a, target: '{question}'}", "fields of target are {answer}"),
        ("x: {input: a, system: '{question}'}", "has {question} in system"),
        ("x: a", "must hold templates"),
        ("- x", "must hold templates"),
        ("", "must hold templates"),
        ("x: {input: a}\nx: {input: b}", "x"),
    ],
)
def test_what_is_wrong_with_a_template_is_named(name: str, message: str, tmp_path) -> None:
    if (":" in name and not name.startswith("{")) or name in ("- x", ""):
        (tmp_path / "f.yaml").write_text(name)
        name = str(tmp_path / "f.yaml")
    with pytest.raises(UserError) as caught:
        of(name)
    assert message in str(caught.value) and caught.value.key == KEY
