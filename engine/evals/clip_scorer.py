"""How well captions fit their images, by a contrastive model: a clip run of ours, or a CLIP.

Each image is encoded once, however many captions are judged; the model reads images its own way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config import schema
from engine.data.bad_samples import summary
from engine.data.batch_memory import stack_images
from engine.data.share import rank_slice
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.errors import FaultError, UserError
from engine.evals.encode import Encoder
from engine.models.pretrained import cached_first, only_errors
from engine.run import Run, is_run
from engine.types import Batch, Sample, Source, Task


@dataclass
class ClipScorer:
    """A contrastive model over a source's images; ``name`` is what the configuration calls it."""

    name: str
    encoder: Encoder

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights with their names: the same model, wherever it was taken from."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.encoder.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def cosines(
        self, source: Source, rows: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """cos(image of the row, each of its texts); every rank gets the same figures."""
        image_ND, text_MD = self.features(source, rows, [t for row in texts for t in row])
        places = np.cumsum([0, *map(len, texts)])
        return [
            (text_MD[start:end] @ image_D).tolist()
            for image_D, start, end in zip(image_ND, places[:-1], places[1:], strict=True)
        ]

    def features(
        self, source: Source, rows: Sequence[int], texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """L2-normed features of the rows' images [N, D], in order, and of the texts [M, D].

        Raises FaultError where an image cannot be read.
        """
        encoded = self.encoder.images(source, np.asarray(rows))
        if encoded.bad:
            raise FaultError(f"{self.name} cannot judge images: {summary(encoded.bad)}")
        at = {int(row): place for place, row in enumerate(encoded.rows)}
        image_ND = encoded.features[[at[int(row)] for row in rows]]
        # equal texts once: samples repeat one another, and then tie to the last bit
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        mine = rank_slice(list(numbers), collectives.rank(), collectives.world())
        text_MD = self.encoder.texts(mine)[[numbers[text] for text in texts]]
        return nn.functional.normalize(image_ND, dim=-1), nn.functional.normalize(text_MD, dim=-1)


def open_scorer(name: str, *, key: str, run: Run) -> ClipScorer:
    """The model called ``name``: a run's folder, or one of its checkpoints, else a hub id or folder
    of a CLIP. It is used as ``run`` uses its own model. Raises UserError."""
    if is_run(Path(name)):
        opened = Run.open(Path(name), "clip", key=key, device=run.device, warn=run.warn)
        task, model, transform = opened.task, opened.model, opened.transform("valid")
    else:
        task, model, transform = _of_hub(name, key)
    model = model.to(run.device).eval().requires_grad_(False)
    data = run.config.data
    encoder = Encoder(
        task, model, transform, run.device, batch_size=data.batch_size_val,
        num_workers=data.num_workers, autocast=run.precision.autocast, limits=run.limits,
    )  # fmt: skip
    return ClipScorer(name, encoder)


def _of_hub(name: str, key: str) -> tuple[Task, nn.Module, pipeline.Pipeline]:
    try:
        with only_errors():
            model = cached_first(transformers.AutoModel, name, dtype=torch.float32)
            tokenizer = cached_first(transformers.AutoTokenizer, name)
            reader = cached_first(transformers.AutoImageProcessor, name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{name!r} is neither the folder of a clip run nor a CLIP that can be loaded: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            key=key,
        ) from error
    if not hasattr(model, "get_image_features"):
        raise UserError(f"{name!r} is a {model.config.model_type!r} model, not a CLIP", key=key)
    size = model.config.vision_config.image_size
    form = schema.Transforms(
        resize=schema.Resize(size=size, interpolation="bicubic"),
        center_crop=schema.Crop(size=size),
    )
    return (
        HubTask(tokenizer, reader.image_mean, reader.image_std),
        model,
        pipeline.build(["resize", "center_crop"], form, key=key),
    )


class HubTask(Task):
    """A CLIP of transformers as a task that encodes."""

    modalities = ("image", "text")

    def __init__(self, words: Any, mean: list[float], std: list[float]) -> None:
        self.words = words  # its tokenizer
        self.mean, self.std = (255 * torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def batch(self, samples: list[Sample]) -> Batch:
        """uint8 images; texts are not needed."""
        return {"image_BCHW": stack_images(samples)}

    def tokenize(self, texts: list[str]) -> Batch:
        """Ids and mask, cut at the model's longest."""
        found = self.words(texts, padding=True, truncation=True, return_tensors="pt")
        return {"input_ids_BT": found["input_ids"], "attention_mask_BT": found["attention_mask"]}

    def encode(self, model: Any, batch: Batch, modality: str) -> Tensor:
        """Projected features [B, D]."""
        if modality == "image":
            image_BCHW = batch["image_BCHW"].contiguous()  # from the loader's BHWC memory
            mean, std = (x.to(image_BCHW.device) for x in (self.mean, self.std))
            found = model.get_image_features(pixel_values=(image_BCHW - mean) / std)
        else:
            found = model.get_text_features(
                input_ids=batch["input_ids_BT"], attention_mask=batch["attention_mask_BT"]
            )
        return getattr(found, "pooler_output", found)
