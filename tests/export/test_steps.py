"""Decoders in ONNX against torch: prompts and what follows, by one graph, of any lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.export import onnx, steps
from engine.export.onnx_runner import Graph, KVState
from engine.models.decoders.language_model import Decoder, DecoderInput
from engine.models.decoders.prefix import PrefixDecoder
from engine.registry import find
from tests.models.decoders.test_decoders import SIZES, VOCABULARY, WIDTH

IMAGE = 5  # tokens
KINDS = {
    **{family: ("causal", SIZES[family]) for family in ("gpt2", "opt", "llama", "mpt")},
    "t5_cross": ("t5_cross", SIZES["t5_cross"]),
    "truncated mpt": ("truncated", SIZES["mpt"]),
    "truncated gpt2": ("truncated", SIZES["gpt2"]),
}


def make(kind: str) -> Decoder:
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    decoder: Decoder = find("models/decoders", name).build(
        Section(name=name, config=sizes, max_length=20), vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    with torch.no_grad():  # random weights of 0.02 hardly look at anything
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return decoder.eval()


SLOW = ("opt", "mpt", "truncated gpt2")  # each has its like among the others


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS],
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, Graph]:
    decoder, folder = make(request.param), tmp_path_factory.mktemp("graph")
    step = steps.step_of(decoder, IMAGE).eval()
    given, past, outputs = steps.arguments_of(step, IMAGE, WIDTH)
    described = onnx.write_graph(
        step, given, outputs, folder / "decoder.onnx", past=past, opset=20, beside=False
    )
    assert described["inputs"]["input_ids"]["shape"] == ["batch", "length"]
    assert described["outputs"]["logits"]["shape"] == ["batch", "length", VOCABULARY]
    return decoder, Graph(folder, described, 1)


def apart(decoder: Decoder) -> bool:
    """Whether it reads labels, which do not see one another."""
    return isinstance(decoder, PrefixDecoder) and decoder.label_mask


def texts_of(decoder: Decoder, ids: np.ndarray, start: int = 0) -> dict[str, np.ndarray]:
    """The graph's inputs beside ids, of one text."""
    if not apart(decoder):
        return {"attention_mask": np.ones_like(ids)}
    places = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
    return {"segment_ids": np.zeros_like(ids), "position_ids": places}


@torch.no_grad()
def logits_of(decoder: Any, image_BND: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> np.ndarray:
    """The whole text at once, without a cache, as training reads it."""
    if apart(decoder):
        places = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        batch = {"input_ids_BT": ids_BT, "attention_mask_BT": mask_BT, "position_BT": places,
                 "segment_BT": torch.zeros_like(ids_BT)}  # fmt: skip
        hidden = decoder.label_hidden(image_BND, batch)
    else:
        hidden = decoder.hidden(DecoderInput(image_BND, ids_BT, mask_BT))
    return F.linear(hidden, *decoder.head()).numpy()


def make_texts(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids_BT = torch.randint(2, VOCABULARY, (rows, 9), generator=generator)
    return torch.randn(rows, IMAGE, WIDTH, generator=generator), ids_BT


@pytest.mark.parametrize(("rows", "parts"), [(1, [1, 1, 2, 5]), (3, [4, 1, 1, 3]), (2, [9])])
def test_logits_are_torchs_however_a_text_is_read(
    exported: tuple[Decoder, Graph], rows: int, parts: list[int]
) -> None:
    decoder, graph = exported
    image_BND, ids_BT = make_texts(rows)
    want = logits_of(decoder, image_BND, ids_BT, torch.ones_like(ids_BT))
    chunks = np.split(ids_BT.numpy(), np.cumsum(parts)[:-1], axis=1)
    first = chunks[0]
    logits, state = KVState.encode_prompt(
        graph, image_BND.numpy(), first, **texts_of(decoder, first)
    )
    found, start = [logits], first.shape[1]
    for chunk in chunks[1:]:
        logits, state = state.extend(chunk, **texts_of(decoder, chunk, start))
        found.append(logits)
        start += chunk.shape[1]
    assert np.abs(np.concatenate(found, axis=1) - want).max() < 1e-4
    assert np.abs(want).max() > 0.1


def test_prompts_padded_on_the_left_are_read_as_if_alone(exported: tuple[Decoder, Graph]) -> None:
    decoder, graph = exported
    if apart(decoder):
        pytest.skip("all its rows have one prompt")
    image_BND, ids_BT = make_texts(3)
    pads = [2, 0, 3]
    ids, mask = ids_BT[:, :5].numpy().copy(), np.ones((3, 5), np.int64)
    for row, number in enumerate(pads):
        ids[row, :number] = mask[row, :number] = 0
    _, state = KVState.encode_prompt(graph, image_BND.numpy(), ids, attention_mask=mask)
    said = ids_BT[:, 5:7].numpy()
    logits, _ = state.extend(said, attention_mask=np.ones_like(said))
    for row, number in enumerate(pads):
        alone = ids_BT[row : row + 1, number:7]
        want = logits_of(decoder, image_BND[row : row + 1], alone, torch.ones_like(alone))
        assert np.abs(logits[row] - want[0, -2:]).max() < 1e-4


def test_labels_side_by_side_do_not_see_one_another(exported: tuple[Decoder, Graph]) -> None:
    decoder, graph = exported
    if not apart(decoder):
        pytest.skip("it reads one text a row")
    image_BND, ids_BT = make_texts(2)
    prompt, first, second = ids_BT[:, :3], ids_BT[:, 3:6], ids_BT[:, 6:9]  # three labels' tokens
    given = texts_of(decoder, prompt.numpy())
    _, state = KVState.encode_prompt(graph, image_BND.numpy(), prompt.numpy(), **given)
    segments = np.tile([1, 2, 3], (2, 1))
    for place, tokens in ((3, first), (4, second)):
        logits, state = state.extend(
            tokens.numpy(), segment_ids=segments, position_ids=np.full_like(segments, place)
        )
    for label in range(3):
        alone = torch.cat([prompt, first[:, [label]], second[:, [label]]], dim=1)
        want = logits_of(decoder, image_BND, alone, torch.ones_like(alone))
        assert np.abs(logits[:, label] - want[:, -1]).max() < 1e-4


def test_weights_lie_beside_their_graph_where_they_are_asked_to(tmp_path: Path) -> None:
    part, example = nn.Linear(64, 64), torch.zeros(2, 64)
    given = [steps.Argument("x", example, {0: "batch"})]
    outputs = {}
    for beside in (False, True):
        folder = tmp_path / str(beside)
        folder.mkdir()
        described = onnx.write_graph(part, given, ["y"], folder / "g.onnx", opset=18, beside=beside)
        assert (folder / "g.onnx.data").exists() == beside
        assert ((folder / "g.onnx").stat().st_size < 64 * 64 * 4) == beside
        value = torch.randn(3, 64)
        outputs[beside] = Graph(folder, described, 1)({"x": value.numpy()})["y"].numpy()
        assert np.abs(outputs[beside] - part(value).detach().numpy()).max() < 1e-5


def test_a_decoder_without_a_form_is_told() -> None:
    with pytest.raises(UserError, match="Decoder cannot be exported to ONNX") as caught:
        steps.step_of(Decoder(nn.Identity(), 4, 0), 3)
    assert caught.value.key == "model.decoder.name"


@pytest.mark.parametrize("family", ["mt5", "umt5"])
@torch.no_grad()
def test_other_families_of_t5_scale_their_states_by_their_own_rule(family: str) -> None:
    sizes = SIZES["t5_cross"] | {"model_type": family}
    section = Section(name="t5_cross", config=sizes, max_length=20)
    decoder = find("models/decoders", "t5_cross").build(
        section, vocab_size=VOCABULARY, pad_id=0, eos_id=1
    )
    step = steps.step_of(decoder.eval(), IMAGE)
    image_BND, ids_BT = make_texts(2)
    past = [torch.zeros(2, 2, 0, 8)] * len(step.cached(image_BND))
    logits = step(ids_BT, torch.ones_like(ids_BT), image_BND, past)[0]
    want = logits_of(decoder, image_BND, ids_BT, torch.ones_like(ids_BT))
    assert np.abs(logits.numpy() - want).max() < 1e-5 < np.abs(want).max()
