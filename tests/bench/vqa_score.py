"""VQAScore of many images and texts beside calls of one pair each.

    python -m tests.bench vqa_score [--threads N]

8 images × 64 captions of drawn scenes in one call, against pairs of them one by one, in random
weights of two sizes: the model of configs/vqa/shapes_stage2.yaml, and a larger one, a ViT-B/32 and
a T5-small of half their widths, which a processor core is busy with whatever the batch. Processor
time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.load import load
from engine.data.sources import open_source
from engine.evals.vqa_score import VQAScore
from tests.bench.runs import ROOT, as_overrides, make_run
from tests.bench.table import Line, Options
from tests.bench.timing import in_turns, ratio

CONFIG = ROOT / "configs" / "vqa" / "shapes_stage2.yaml"
LARGE = {
    "transforms.resize.size": [224, 224],
    "model.connector.keep_cls": False,
    "model.decoder.config": {
        "d_model": 256, "d_ff": 512, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 8,
    },
}  # fmt: skip
LARGE_TOWER = {"tag": "vit_base_patch32_224", "param": {"embed_dim": 384, "num_heads": 6}}


def scorer(folder: Path, changed: dict[str, Any]) -> tuple[VQAScore, tuple[int, int], list[str]]:
    """A model of random weights, its images' size, and captions in words that it knows."""
    shapes = {"format": "shapes", "num_train": 300, "num_valid": 64, "image_size": 64}
    values = {
        "data.data_path": str(folder), "ckpt.dir": str(folder), "model.init": None,
        "data.datasets": {"shapes": shapes}, "data.train_name": ["shapes"],
        "data.valid_name": ["shapes"], "data.train_type": "shuffle", "data.num_workers": 0,
    }  # fmt: skip
    config = load(CONFIG, as_overrides(values | changed))
    if changed:
        tower = config.model.image_encoder.model_copy(update=LARGE_TOWER)
        model = config.model.model_copy(update={"image_encoder": tower})
        config = config.model_copy(update={"model": model})
    run = make_run(config, "vqa")
    source = open_source("shapes", "valid", config.data, key="data.valid_name")
    said = [source[row].caption for row in range(len(source))]
    return VQAScore(run.build_model().eval(), run.task), run.task.image_size, said


def rows(options: Options) -> Iterator[Line]:
    """Milliseconds a pair on both sides; the ratio is of pairs a second."""
    images, texts, alone = (2, 4, 4) if options.quick else (8, 64, 32)
    sizes = {"shapes": ({}, "≥ 4"), "half a ViT-B/32 and T5-small": (LARGE, "")}
    for name, (changed, mark) in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            score, size, captions = scorer(Path(folder), changed)
        said = captions[:texts]
        image_MCHW = torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(0))
        # a share of the pairs is enough to time: all of an image's cost alike
        pairs = [(n % images, n * texts // alone) for n in range(alone)]

        def one_by_one(
            score: Any = score, image: Any = image_MCHW, said: Any = said, pairs: Any = pairs
        ) -> Tensor:
            return torch.stack([score(image[i : i + 1], said[j : j + 1])[0, 0] for i, j in pairs])

        def at_once(score: Any = score, image: Any = image_MCHW, said: Any = said) -> Tensor:
            return score(image, said)

        whole = at_once()
        found = torch.stack([whole[i, j] for i, j in pairs])
        torch.testing.assert_close(found, one_by_one(), rtol=1e-4, atol=1e-7)
        seconds = in_turns(
            {"ours": at_once, "alone": one_by_one}, 1 if options.quick else options.repeats
        )
        ours = [value / (images * texts) for value in seconds["ours"]]
        peer = [value / alone for value in seconds["alone"]]
        middle = len(ours) // 2
        yield Line(f"{name}, {images} × {texts}, pairs/s ÷ one by one",
                   1e3 * sorted(ours)[middle], 1e3 * sorted(peer)[middle],
                   **ratio(peer, ours), mark=mark, unit="ms")  # fmt: skip
