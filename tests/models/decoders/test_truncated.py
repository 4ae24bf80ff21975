"""The truncated decoder: who sees whom, what is lost, what is kept — against loops and peers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.schema import Decoder as Section
from engine.data.text.labels import LabelRow, lay_out, stack
from engine.errors import UserError
from engine.models.decoders.language_model import DecoderInput
from engine.registry import find
from tests.models.decoders.test_decoders import IMAGE, SIZES, VOCABULARY, WIDTH

FAMILIES = ["gpt2", "opt", "llama", "mpt"]
SEPARATOR, PROMPT = 2, [1, 7, 8, 9]
LABELS = [[11, 12, SEPARATOR], [13, SEPARATOR], [14, 15, 16, SEPARATOR]]


@pytest.fixture(autouse=True)
def wide_softmax(monkeypatch) -> None:
    """MPT's softmax is in fp32 whatever its weights; here fp64 stays what it is."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)
    )


def make(family: str, blocks: int = 3, name: str = "truncated") -> Any:
    torch.manual_seed(0)
    layers = "n_layer" if family == "gpt2" else "n_layers" if family == "mpt" else None
    sizes = SIZES[family] | {layers or "num_hidden_layers": blocks}
    section = Section(name=name, config=sizes, max_length=24)
    decoder = find("models/decoders", name).build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    with torch.no_grad():  # random weights of 0.02 hardly look at anything
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return decoder.double().eval()


def images(rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, IMAGE, WIDTH, generator=generator, dtype=torch.float64)


def label_log_probs(decoder, image_BND, labels, *, nxtp=False, per_label=True) -> list[float]:
    """log p of each label, its separator included, out of one row that holds them all."""
    row = lay_out(PROMPT, labels, nxtp=nxtp, per_label=per_label)
    batch = stack([row], 0)
    log_p_TV = decoder.log_probs(decoder.label_hidden(image_BND, batch))[0].detach()
    found = [0.0] * len(labels)
    for place, source in enumerate(row.source):
        if source >= 0:
            found[row.segment[place] - 1] += float(log_p_TV[source, row.ids[place]])
    return found


# --- independence


@pytest.mark.parametrize("family", FAMILIES)
def test_other_labels_change_nothing_of_a_label(family: str) -> None:
    decoder, image = make(family), images()
    alone = [label_log_probs(decoder, image, [label])[0] for label in LABELS]
    for order in itertools.permutations(range(3)):
        found = label_log_probs(decoder, image, [LABELS[i] for i in order])
        assert found == pytest.approx([alone[i] for i in order], abs=1e-9)
    for kept in range(3):  # the first, the middle and the last, among longer and other ones
        others = [[20 + i, 30, 31, 32, 33, SEPARATOR] for i in range(3)]
        others[kept] = LABELS[kept]
        found = label_log_probs(decoder, image, others)
        assert found[kept] == pytest.approx(alone[kept], abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_other_labels_change_rounding_alone(family: str) -> None:
    """A token's log p is about −8, where fp32 has steps of 5e-7."""
    decoder, image = make(family).float(), images().float()
    alone = [label_log_probs(decoder, image, [label])[0] for label in LABELS]
    for order in itertools.permutations(range(3)):
        found = label_log_probs(decoder, image, [LABELS[i] for i in order])
        assert found == pytest.approx([alone[i] for i in order], abs=4e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequential_positions_and_nxtps_rule_do_not_have_it(family: str) -> None:
    """So the test above would see a fault."""
    decoder, image = make(family), images()
    for rule in ({"per_label": False}, {"nxtp": True, "per_label": True}):
        one = label_log_probs(decoder, image, LABELS, **rule)[1]
        other = label_log_probs(decoder, image, [[30, 31, 32, SEPARATOR], *LABELS[1:]], **rule)[1]
        assert abs(one - other) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_labels_probability_is_that_of_text_behind_the_prompt(family: str) -> None:
    """The causal decoder over the same weights, one label a text, is the peer."""
    decoder, image = make(family), images()
    peer = make(family, name="causal").requires_grad_(False)
    for label, got in zip(LABELS, label_log_probs(decoder, image, LABELS), strict=True):
        text = torch.tensor([PROMPT + label])
        hidden = peer.hidden(DecoderInput(image, text, torch.ones_like(text)))[0]
        log_p = F.linear(hidden, peer.head()[0]).log_softmax(-1)
        places = range(len(PROMPT) - 1, len(PROMPT) + len(label) - 1)
        want = sum(float(log_p[place, text[0, place + 1]]) for place in places)
        assert got == pytest.approx(want, abs=1e-9)


# --- the mask and the loss


def nxtp_by_loop(num_image: int, ids: list[int]) -> list[list[bool]]:
    """The paper's code in words. All is causal, but for image tokens, which see one another.

    Nothing behind the prompt's last token A is encoded, until each comma is come upon: between A or
    the comma before it, and itself, what lies there is causal among itself.
    """
    length, answer = num_image + len(ids), num_image + len(PROMPT) - 1
    sees = [[j <= i and j <= answer for j in range(length)] for i in range(length)]
    for i in range(num_image):
        for j in range(num_image):
            sees[i][j] = True
    start = answer
    for place, token in enumerate(ids):
        comma = num_image + place
        if token == SEPARATOR and comma > answer:
            for i in range(start, comma + 1):
                for j in range(start, i + 1):
                    sees[i][j] = True
            start = comma + 1
    return sees


@pytest.mark.parametrize("count", [1, 2, 3])
def test_nxtps_mask_is_that_of_its_code(count: int, monkeypatch) -> None:
    decoder = make("llama")
    row = lay_out(PROMPT, LABELS[:count], nxtp=True, per_label=False)
    assert row.ids[-1] != SEPARATOR and row.ids.count(SEPARATOR) == count - 1
    assert row.position == list(range(len(row.ids)))
    learned = [place for place, source in enumerate(row.source) if source >= 0]
    assert learned == list(range(len(PROMPT), len(row.ids)))
    assert all(row.source[place] == place - 1 for place in learned)
    seen = []
    base, forward = decoder.base[0], decoder.base[0].forward
    monkeypatch.setattr(
        base, "forward", lambda **more: seen.append(more["attention_mask"]) or forward(**more)
    )
    decoder.label_hidden(images(), stack([row], 0))
    assert (seen[0][0, 0] == 0).tolist() == nxtp_by_loop(IMAGE, row.ids)


def rows_of_texts() -> list[LabelRow]:
    """Rows of unlike lengths and numbers of labels."""
    chosen = [LABELS, LABELS[:1], [LABELS[2], LABELS[0]]]
    return [lay_out(PROMPT, labels, nxtp=False, per_label=True) for labels in chosen]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_labels_one_by_one(family: str, smoothing: float) -> None:
    decoder, image = make(family), images(3)
    rows = rows_of_texts()
    got = decoder.label_losses(image, stack(rows, 0), smoothing)
    for number, row in enumerate(rows):
        want = 0.0
        for label in range(1, max(row.segment) + 1):
            ids = [i for i, s in zip(row.ids, row.segment, strict=True) if s == label]
            batch = stack([lay_out(PROMPT, [ids], nxtp=False, per_label=False)], 0)
            hidden = decoder.label_hidden(image[number : number + 1], batch)[0]
            for place, token in enumerate(ids, len(PROMPT)):
                log_p = decoder.log_probs(hidden[place - 1])
                want += float(-(1 - smoothing) * log_p[token] - smoothing * log_p.mean())
        assert float(got[number]) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_behind_what_was_read_equals_reading_all(family: str) -> None:
    decoder, image = make(family), images(2)
    row = lay_out(PROMPT, LABELS, nxtp=False, per_label=True)
    want = decoder.label_hidden(image, stack([row, row], 0))
    state = decoder.encode_prompt(image, torch.tensor(PROMPT))
    torch.testing.assert_close(state.last_BD, want[:, len(PROMPT) - 1], rtol=1e-9, atol=1e-9)
    once = state.fork()
    behind = slice(len(PROMPT), None)
    parts = [torch.tensor([part[behind]] * 2) for part in (row.ids, row.segment, row.position)]
    got = decoder.extend(once, *parts)
    torch.testing.assert_close(got, want[:, behind], rtol=1e-9, atol=1e-9)
    # token by token of all labels side by side, and the first state is as it was
    told = state.fork()
    for step in range(2):
        ids = torch.tensor([[label[step] for label in LABELS]] * 2)
        segment = torch.arange(1, 4).expand(2, -1)
        got = decoder.extend(told, ids, segment, torch.full_like(ids, len(PROMPT) + step))
        places = [row.segment.index(label) + step for label in (1, 2, 3)]
        torch.testing.assert_close(got, want[:, places], rtol=1e-9, atol=1e-9)
    assert state.num_image + state.num_text == state.cache.get_seq_length() == IMAGE + len(PROMPT)


# --- blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", [{"num_blocks": 2}, {"keep": [0, 2]}, {"keep": [1]}])
def test_kept_blocks_are_the_saved_models_own(family: str, choice: dict, tmp_path) -> None:
    whole = make(family, blocks=4)
    whole.model.float().save_pretrained(tmp_path)
    section = Section(name="truncated", tag=str(tmp_path), pretrained=True, max_length=24, **choice)
    decoder = find("models/decoders", "truncated").build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    keep = choice.get("keep", list(range(choice.get("num_blocks", 0))))
    known = dict(whole.model.named_parameters())
    chosen = set()
    for name, parameter in decoder.model.named_parameters():
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdecimal()]
        if places:
            parts[places[0]] = str(keep[int(parts[places[0]])])
            chosen.add(int(parts[places[0]]))
        assert torch.equal(parameter, known[".".join(parts)]), name
    assert chosen == set(keep)
    state = decoder.eval().encode_prompt(images().float(), torch.tensor(PROMPT))
    assert len(state.cache.layers) == len(keep)  # each has its own cache


def test_a_mark_of_the_image_gets_a_row_of_its_own(tmp_path) -> None:
    make("llama").model.float().save_pretrained(tmp_path)
    section = Section(name="truncated", tag=str(tmp_path), pretrained=True, image_token="<image>")
    build = find("models/decoders", "truncated").build
    decoder = build(section, vocab_size=VOCABULARY + 1, pad_id=0, eos_id=1)
    assert decoder.model.get_input_embeddings().num_embeddings == VOCABULARY + 1
    assert len(decoder.head()[0]) == VOCABULARY + 1
    with pytest.raises(UserError, match="knows only 40"):
        build(section, vocab_size=VOCABULARY + 2, pad_id=0, eos_id=1)


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        ({"num_blocks": 0}, "num_blocks", "no block of decoder 'llama' is kept; keep at least"),
        ({"keep": []}, "keep", "no block of decoder 'llama' is kept"),
        ({"num_blocks": 4}, "num_blocks", "block 3 is to be kept .* which has blocks 0 … 1"),
        ({"keep": [0, 5]}, "keep", "block 5 is to be kept"),
        ({"keep": [1, 0]}, "keep", "each block once, in rising order"),
        ({"keep": [0], "num_blocks": 1}, "keep", "both choose blocks"),
        ({"config": {"model_type": "t5"}}, "config.model_type", "cannot be a 't5' model"),
        ({"config": {"model_type": "bloom"}}, "config.model_type", "counts positions by itself"),
        (
            {"config": {"model_type": "mamba"}},
            "config.model_type",
            "'mamba' model has no attention",
        ),
        ({"config": {"model_type": "gemma2"}}, "config.model_type", "final_logit_softcapping: 30"),
        (
            {"config": SIZES["llama"] | {"model_type": "granite", "logits_scaling": 8.0}},
            "config.model_type",
            "logits_scaling: 8",
        ),
        (
            {"config": SIZES["llama"] | {"model_type": "bert"}},
            "",
            "blocks of a 'bert' model are not a list",
        ),
    ],
)
def test_mistakes_are_named(section: dict, key: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        find("models/decoders", "truncated").build(
            Section(**({"name": "truncated", "config": SIZES["llama"]} | section)),
            vocab_size=VOCABULARY, pad_id=0, eos_id=1,
        )  # fmt: skip
    assert error.value.key == f"model.decoder.{key}".rstrip(".")
