"""The contrastive task: what its batches hold, and what its features carry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.config import schema
from engine.config.schema import Transforms
from engine.data.text import bytes as byte_tokenizer
from engine.tasks.clip import ClipTask
from engine.types import Row, Sample

TEXTS = ["a dog", "two cats on a red mat", "rain"]
MAX_LENGTH = 40


def make_task(augment: dict[str, float] | None = None, **loss: object) -> ClipTask:
    config = schema.Config(
        loss=schema.Loss(**loss),
        transforms=Transforms(text_augment=augment or {}),
        model=schema.Model(text_encoder=schema.TextEncoder(max_length=MAX_LENGTH)),
    )
    return ClipTask(config, byte_tokenizer.build(schema.Tokenizer(name="bytes")))


def samples(seeds: list[int] | None = None) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            Row(f"k{n}", (), text, f"i{n}", f"c{n}"),
            (torch.randint(256, (3, 4, 4), dtype=torch.uint8, generator=generator),),
            n % 2, 10 + n, seed=seeds[n] if seeds else None,
        )
        for n, text in enumerate(TEXTS)
    ]  # fmt: skip


def test_images_stay_uint8_and_texts_are_as_long_as_the_longest() -> None:
    batch = make_task().batch(samples())
    assert batch["image_BCHW"].dtype == torch.uint8
    assert torch.equal(batch["image_BCHW"][1], samples()[1].images[0])
    lengths = batch["attention_mask_BT"].sum(1)
    assert lengths.tolist() == [len(text) + 2 for text in TEXTS]
    assert batch["input_ids_BT"].shape == (3, int(lengths.max()))
    assert batch["dataset_B"].tolist() == [0, 1, 0]
    assert batch["index_B"].tolist() == [10, 11, 12]


def test_a_text_is_cut_at_the_longest_allowed() -> None:
    batch = make_task().tokenize(["x" * 300, "y"])
    assert batch["input_ids_BT"].shape == (2, MAX_LENGTH)


def test_texts_are_augmented_in_training_alone() -> None:
    task = make_task({"mask": 1.0})
    plain = make_task().batch(samples([1, 2, 3]))["input_ids_BT"]
    masked = task.batch(samples([1, 2, 3]))["input_ids_BT"]
    assert not torch.equal(masked, plain)
    assert set(masked[0, 1:6].tolist()) == {task.tokenizer.mask_id}
    assert torch.equal(task.batch(samples())["input_ids_BT"], plain)  # an evaluation has no seeds
    assert torch.equal(task.tokenize(TEXTS)["input_ids_BT"], plain)


@pytest.mark.parametrize(
    ("name", "interact"), [("NCE", False), ("Sigmoid", False), ("MixUpNCE", True)]
)
def test_rows_interact_under_mixup_alone(name: str, interact: bool) -> None:
    assert make_task(name=name).rows_interact == interact


def test_features_carry_the_steps_mix() -> None:
    task = make_task(name="MixUpNCE")
    seen = []

    def model(batch: dict, mix: object) -> dict[str, torch.Tensor]:
        seen.append(mix)
        unit = F.normalize(torch.randn(3, 4), dim=1)
        return {"image_BD": unit, "text_BD": unit, "logit_scale": torch.zeros(1)}

    features = [task.features(model, {"step": step}) for step in (5, 5, 6)]
    assert seen[0] == seen[1] != seen[2]
    assert features[0].info == {"lam": seen[0].lam}
    assert features[0].shared.keys() == {"logit_scale"}
    assert features[0].per_sample.keys() == {"image_BD", "text_BD"}
    losses = task.losses(features[0])
    assert losses.keys() == {"loss"}
    assert features[0].info["batch_R@1"] == 100.0
