"""Exported models in onnxruntime beside the engine in torch, on the CPU, with as many threads.

    python -m tests.bench onnx [--threads N]

The same weights and images on both sides, preprocessing left out: a batch's features, captions
token by token to their full length, twenty labels by one-shot sampling. What comes out is equal
before anything is timed. Time is the processor's, of all threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import schema
from engine.config.schema import Export, Generate, Resize, Transforms
from engine.data.text import bytes as byte_tokenizer
from engine.export import onnx
from engine.export.onnx_runner import open_folder
from engine.generate.labels import encode_prompt, recognise
from engine.generate.texts import generate_texts
from engine.registry import find
from engine.run import Run
from tests.bench.table import Line, Options
from tests.bench.timing import summaries
from tests.export.models import opened

LABELS, TOKENS = 20, 24
UNSAID = 8191  # a token of none of the texts
Sides = tuple[Callable[[], Any], Callable[[], Any]]


def settings(quick: bool) -> dict[str, dict[str, Any]]:
    """Sections of each task's model; all have one image encoder."""
    width, layers = (32, 1) if quick else (384, 6)
    text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2 * layers,
            "intermediate_size": 4 * width}  # fmt: skip
    causal = {"n_embd": width, "n_layer": layers, "n_head": 2 * layers, "vocab_size": 8192}
    t5 = {"d_model": width, "d_kv": 32, "d_ff": 4 * width, "num_decoder_layers": layers,
          "num_heads": 2 * layers, "vocab_size": 8192}  # fmt: skip
    room = {"max_length": TOKENS + 1}
    return {
        "clip": {"text_encoder": {"config": {"model_type": "bert"} | text, "max_length": 77}},
        "caption, gpt2": {
            "decoder": {"name": "causal", "config": {"model_type": "gpt2"} | causal} | room
        },
        "caption, t5_cross": {
            "decoder": {"name": "t5_cross", "config": {"model_type": "t5"} | t5} | room
        },
        "recognize, llama": {
            "decoder": {"name": "truncated", "max_length": 64,
                        "config": {"model_type": "llama", "vocab_size": 8192} | text}
        },
    }  # fmt: skip


def make(task_name: str, sections: Mapping[str, Any], quick: bool) -> Run:
    """A model of random weights, in whose texts no end comes but a label's separator does."""
    size, width, layers = (32, 32, 1) if quick else (224, 384, 6)
    encoder = {"tag": "vit_tiny_patch16_224",
               "param": {"embed_dim": width, "depth": layers, "num_heads": 2 * layers}}  # fmt: skip
    config = schema.Config(
        transforms=Transforms(
            train_transforms=["resize"], valid_transforms=["resize"],
            resize=Resize(size=(size, size)),
        ),
        model=schema.Model.model_validate({"image_encoder": encoder, **sections}),
    )  # fmt: skip
    tokenizer = byte_tokenizer.build(schema.Tokenizer(name="bytes"))
    task = find("tasks", task_name).build(config, tokenizer)
    torch.manual_seed(0)
    model = task.build_model().eval().requires_grad_(False)
    if task_name == "recognize":
        model.decoder.head()[0][task.separator_id] *= 2
    return opened(task_name, config, task, model)


def sides(trained: Run, ours: Any, image_BCHW: Tensor) -> Sides:
    """The same work in onnxruntime and in torch; both return what came out of it."""
    task, model = trained.task, trained.model
    values = image_BCHW.numpy()
    if trained.task_name == "clip":
        batch = {"image_BCHW": image_BCHW}
        return (
            lambda: ours.encode(values).numpy(),
            lambda: task.encode(model, batch, "image").numpy(),
        )
    if trained.task_name == "caption":
        task.eos_id = ours.text["end_id"] = UNSAID
        section, prompts = Generate(), [""] * len(values)
        return (
            lambda: ours.captions(values),
            lambda: [text for (text,) in generate_texts(task, model, image_BCHW, prompts, section)],
        )
    section = Generate(method="one_shot", num_labels=LABELS)
    return (
        lambda: [[(one.text, one.prob) for one in found] for found in ours.labels(values, LABELS)],
        lambda: [
            [(one.text, one.prob) for one in found]
            for found in recognise(task, model, encode_prompt(task, model, image_BCHW), section)
        ],
    )


def assert_equal(ours: Any, peer: Any) -> None:
    """Features and probabilities to 1e-4, texts to the letter."""
    if isinstance(peer, np.ndarray):
        assert np.abs(ours - peer).max() < 1e-4
    elif peer and isinstance(peer[0], str):
        assert ours == peer
    else:
        for one, other in zip(ours, peer, strict=True):
            assert [text for text, _ in one] == [text for text, _ in other]
            assert all(abs(p - q) < 1e-4 for (_, p), (_, q) in zip(one, other, strict=True))


def rows(options: Options) -> Iterator[Line]:
    """Torch's processor time ÷ onnxruntime's."""
    for name, sections in settings(options.quick).items():
        with tempfile.TemporaryDirectory() as folder:
            trained = make(name.partition(",")[0], sections, options.quick)
            onnx.build(trained, Path(folder) / "onnx", Export(), "export.output")
            ours = open_folder(Path(folder) / "onnx", threads=options.threads)
            for count in (2,) if options.quick else (1, 8):
                generator = torch.Generator().manual_seed(count)
                size = tuple(ours.manifest["image"]["size"])
                image_BCHW = torch.randn(count, 3, *size, generator=generator)
                mine, torchs = map(torch.no_grad(), sides(trained, ours, image_BCHW))
                assert_equal(mine(), torchs())
                repeats = 1 if options.quick else options.repeats
                found = summaries({"ours": mine, "torch": torchs}, repeats)
                seconds = {name: timing.seconds for name, timing in found.items()}
                yield Line(
                    f"{name}, {count} images, torch ÷ onnxruntime",
                    ours=1e3 * seconds["ours"], peer=1e3 * seconds["torch"],
                    ratio=seconds["torch"] / max(seconds["ours"], 1e-9),
                    spread=max(timing.spread for timing in found.values()), mark="≥ 1", unit="ms",
                )  # fmt: skip
