"""Captioning learns alike by the plain step and by DGA's, on one rank and on two."""

from __future__ import annotations

import functools

import pytest
import torch

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.data.transforms.pipeline import output_size
from engine.dist import collectives
from engine.tasks.caption import CaptionTask
from engine.train import rng
from engine.train.steps import batches
from engine.types import Row, Sample
from tests.distributed import run
from tests.train import tiny

SIZE, STEPS = 8, 6
TEXTS = ["a dog", "two cats on a mat", "rain", "x", "many birds", "no", "snow falls"]
DECODERS = {
    "causal": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "t5_cross": {
        "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "dropout_rate": 0.0,
    },
}  # fmt: skip
TOWER = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
LAYERS = {"causal": -2, "t5_cross": -1}
STEPPING = {"plain": (None, 0), "auto": (2, "auto"), "none": (2, 0), "all": (2, 99)}


def make_task(name: str) -> CaptionTask:
    config = schema.Config(
        transforms=schema.Transforms(
            train_transforms=["resize"], valid_transforms=["resize"], resize={"size": (SIZE, SIZE)}
        ),
        model=schema.Model(
            image_encoder=schema.ImageEncoder(tag="vit_tiny_patch16_224", param=TOWER),
            connector=schema.Connector(name="linear_norm", layer=LAYERS[name]),
            decoder=schema.Decoder(name=name, config=DECODERS[name], max_length=20),
        ),
    )
    assert output_size(["resize"], config.transforms) == (SIZE, SIZE)
    return CaptionTask(config, byte_tokenizer.build(schema.Tokenizer(name="bytes")))


def samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    shape = 3, SIZE, SIZE
    return [
        Sample(Row(f"k{n}", (), TEXTS[(n + step) % 7], f"i{n}", f"c{n}"),
               (torch.randint(256, shape, dtype=torch.uint8, generator=generator),), 0, n)
        for n in range(7)
    ]  # fmt: skip


def learn(name: str, stepping: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The mean loss over ranks of each step, and the weights after all."""
    task = make_task(name)
    with rng.isolated(0, tiny.CPU):
        module = task.build_model().double().train()
    model = tiny.replicas(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    rank, world = collectives.rank(), collectives.world()
    gradients = tiny.make_step(task, model, *STEPPING[stepping])
    losses = []
    for step in range(STEPS):
        mine = samples(step)[rank::world]
        batch = task.batch(mine) | {"step": step}
        loss = gradients(batches.take(batch, slice(None)), step)["loss"]
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(sum(collectives.all_gather_json(float(loss))) / world)
    return losses, {key: value.clone() for key, value in module.state_dict().items()}


def learn_all_ways(name: str) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {stepping: learn(name, stepping) for stepping in STEPPING}


@functools.cache
def reference(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    return learn(name, "plain")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_every_step_learns_alike(name: str, world: int) -> None:
    """By a connector that leaves the last layer of the tower out, too: no rank waits for it."""
    losses, weights = reference(name)
    assert losses[-1] < losses[0] - 0.3
    ranks = run(learn_all_ways, world, name) if world > 1 else [learn_all_ways(name)]
    for found in ranks:
        for stepping, (got, after) in found.items():
            told = f"{name} by {stepping}"
            assert got == pytest.approx(losses, abs=1e-10), told
            for key, value in weights.items():
                assert torch.allclose(after[key], value, rtol=0, atol=1e-8), f"{told}: {key}"


def test_what_the_connector_leaves_out_does_not_train() -> None:
    with rng.isolated(0, tiny.CPU):
        module = make_task("causal").build_model()
    frozen = {n for n, p in module.image_encoder.named_parameters() if not p.requires_grad}
    left_out = ("model.blocks.2.", "model.norm.")
    assert frozen == {
        n for n, _ in module.image_encoder.named_parameters() if n.startswith(left_out)
    }
    _, weights = reference("causal")
    for key, value in module.double().state_dict().items():
        name = key.removeprefix("image_encoder.")
        if key != name and name.startswith(("model.blocks.", "model.norm.")):
            assert torch.equal(weights[key], value) == (name in frozen), key
