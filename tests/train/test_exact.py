"""Every step × every loss × every form of exchange: gradients against whole matrices in fp64.

The oracle is one process: the towers by hand for all ranks' rows, with the random numbers that each
sub-batch of each rank draws, and the loss over the whole matrix of similarities.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import schema
from engine.data.text import bytes as byte_tokenizer
from engine.dist import collectives
from engine.models.dual_encoder import DualEncoder, partner_offsets
from engine.tasks.clip import ClipTask
from engine.train import rng
from engine.train.steps import batches
from engine.types import Mix
from tests.distributed import run
from tests.losses.oracle import whole_loss
from tests.train import tiny

COUNTS = {1: [11], 2: [9, 7], 4: [5, 6, 4, 5]}
ROWS = 3  # of a sub-batch: uneven ones in every case above, of odd sizes too
KEEPS = (None, 0, 1, 99)  # None: the plain step
BOTH = {"beta": 2.0, "modality": "both", "partner": "random"}
LOSSES: tuple[dict[str, Any], ...] = (
    {"name": "NCE"},
    {"name": "MixUpNCE", "mixup": {"beta": 2.0}},
    {"name": "MixUpNCE", "mixup": BOTH},
    {"name": "Sigmoid"},
    {"name": "MixUpSigmoid", "mixup": BOTH},
)


class Image(nn.Module):
    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.GELU(), nn.Dropout(0.3))
        self.head = nn.Linear(7, 5)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.head(self.layers(image_BCHW))


class Text(nn.Module):
    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Embedding(20, 6), nn.Dropout(0.3)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        weight_BT1 = attention_mask_BT[..., None].to(self.embed.weight.dtype)
        return (self.dropout(self.embed(input_ids_BT)) * weight_BT1).sum(1) / weight_BT1.sum(1)


def make_task(loss: dict[str, Any], gather: str, group: int) -> ClipTask:
    options = {"nce_loss": {"group_size": group}, "sigmoid_loss": {"group_size": group}}
    config = schema.Config(
        runner=schema.Runner(seed=tiny.SEED),
        loss=schema.Loss(gather=gather, tile_size=3, **options, **loss),
    )
    return ClipTask(config, byte_tokenizer.build(schema.Tokenizer(name="bytes")))


def make_model(task: ClipTask) -> DualEncoder:
    with rng.isolated(0, tiny.CPU):
        statistics = [0.4] * 3, [0.3] * 3
        model = DualEncoder(Image(), Text(), 4, task.loss.parameters, {}, *statistics).double()
    with torch.no_grad():  # where neither the loss nor its gradient is next to nothing
        for name, value in (("logit_scale", 2.0), ("logit_bias", -1.0)):
            if hasattr(model, name):
                getattr(model, name).fill_(value)
    return model


def make_batch(rank: int, counts: Sequence[int]) -> dict[str, Any]:
    return tiny.make_batch(counts, rank) | {"dataset_B": torch.zeros(counts[rank]).long()}


def steps_of(task: ClipTask) -> list[int]:
    """Steps of either coin where there is one."""
    mix = task.loss.mix(0, tiny.SEED)
    if mix is None or (mix.image and mix.text):
        return [tiny.STEP]
    found = {task.loss.mix(step, tiny.SEED).image: step for step in range(20)}
    assert found.keys() == {True, False}
    return [*found.values()]


def cases(world: int) -> list[tuple[dict[str, Any], str, int]]:
    """(loss, gather, group_size)."""
    groups = [-1] if world == 1 else [-1, world // 2]
    return [*itertools.product(LOSSES, ("all", "ring"), groups)]


def gradients_of_all(counts: Sequence[int]) -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) on this rank of every case, step number and step, in this order."""
    found, models = [], {}
    for loss, gather, group in cases(len(counts)):
        task = make_task(loss, gather, group)
        scalars = tuple(task.loss.parameters)  # models differ in these alone
        if scalars not in models:
            models[scalars] = tiny.replicas(make_model(task))
        model = models[scalars]
        for number, keep in itertools.product(steps_of(task), KEEPS):
            batch = make_batch(collectives.rank(), counts) | {"step": number}
            if keep is None:  # the loader trims texts to the batch's longest
                batch = batches.take(batch, slice(None))
                step = tiny.make_step(task, model, None)
            else:
                step = tiny.make_step(task, model, ROWS, keep)
            losses = step(batch, number)
            found.append((float(losses["loss"]), tiny.gradients(model)))
    return found


def features_by_hand(
    model: DualEncoder, part: dict[str, Any], mix: Mix | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, texts and each row's partner; the towers draw in this order."""
    image = (part["image_BCHW"].double() - model.mean_C11) / model.std_C11
    partner = None
    if mix is not None:
        partner = torch.arange(len(image)) + partner_offsets(mix, len(image))
        if mix.partner == "reversed":
            assert partner.tolist() == list(reversed(range(len(image))))
        if mix.image:
            image = mix.lam * image + (1 - mix.lam) * image[partner]
    image = model.image_encoder(image) @ model.image_projection.weight.T
    text = model.text_encoder(part["input_ids_BT"], part["attention_mask_BT"])
    text = text @ model.text_projection.weight.T
    if mix is not None and mix.text:
        text = mix.lam * text + (1 - mix.lam) * text[partner]
    return F.normalize(image, dim=1), F.normalize(text, dim=1), partner


def oracle(
    task: ClipTask, counts: Sequence[int], rows: int, number: int
) -> tuple[float, dict[str, Tensor]]:
    """One λ and one coin for all ranks and sub-batches; one graph over all rows."""
    model, mix = make_model(task), task.loss.mix(number, tiny.SEED)
    parts = -(-max(counts) // rows)
    images, texts, partners = [], [], []
    for rank in range(len(counts)):
        batch = make_batch(rank, counts)
        sets = tiny.row_sets(batch, parts, sort=mix is None and parts > 1)
        done = []
        for j, chosen in enumerate(sets):
            longest = int(batch["attention_mask_BT"][chosen].sum(1).max())
            part = {name: v[chosen] for name, v in batch.items() if isinstance(v, Tensor)}
            part |= {name: v[:, :longest] for name, v in part.items() if name.endswith("_BT")}
            with rng.isolated(rng.derive(tiny.SEED, number, rank, j), tiny.CPU):
                image, text, partner = features_by_hand(model, part, mix)
            if partner is not None:
                partner = torch.tensor(chosen)[partner]
            done.append((image, text, partner))
        back = torch.tensor([row for chosen in sets for row in chosen]).argsort()
        image, text = (torch.cat([part[k] for part in done])[back] for k in (0, 1))
        images.append(image)
        texts.append(text)
        if mix is not None:
            partners.append(torch.cat([part[2] for part in done])[back])
    bias = getattr(model, "logit_bias", torch.zeros(1))
    inputs = torch.cat(images), torch.cat(texts), model.logit_scale, bias
    lam = 1.0 if mix is None else mix.lam
    loss = whole_loss(task.config.loss, counts, inputs, partners if mix else None, lam)
    loss.sum().backward()
    return float(loss.detach()), tiny.gradients(model)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_step_and_loss_gives_the_whole_matrixs_gradients(world: int) -> None:
    counts = COUNTS[world]
    by_rank = run(gradients_of_all, world, counts) if world > 1 else [gradients_of_all(counts)]
    results = zip(*by_rank, strict=True)
    for loss, gather, group in cases(world):
        task = make_task(loss, gather, group)
        scalars = {"logit_scale", "logit_bias"} if "igmoid" in loss["name"] else {"logit_scale"}
        for number in steps_of(task):
            wants = {rows: oracle(task, counts, rows, number) for rows in (ROWS, max(counts))}
            for keep in KEEPS:
                value, want = wants[max(counts) if keep is None else ROWS]
                case = f"{loss} {gather} group {group} keep {keep} step {number}"
                assert want.keys() > scalars, case
                ranks = next(results)
                assert abs(sum(rank[0] for rank in ranks) / world - value) < 1e-11, case
                for _, got in ranks:
                    assert tiny.largest_error(got, want) < 1e-10, case
