"""open_clip's own folder: ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` reads it.

It knows a timm model as it comes, and BERT, RoBERTa or XLM-RoBERTa as transformers have it, each
with a linear projection without a bias: a dual encoder of other parts is refused. The text
encoder's configuration is in ``text/``; its place is written as an absolute path, because
open_clip takes no other: where the folder is moved, change it in the JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before timm, which imports torchvision

import timm  # isort: skip
from engine.config.schema import Config, Export
from engine.errors import UserError
from engine.export.folder import check_task, finish, new_folder, tokenizer_of, write_json
from engine.export.images import image_section
from engine.models.dual_encoder import DualEncoder
from engine.run import Run

_TEXTS = ("bert", "roberta", "xlm-roberta")
_POOLERS = {"first": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
_CONFIG, _WEIGHTS, _TEXT = "open_clip_config.json", "open_clip_model.safetensors", "text"


def build(run: Run, folder: Path, section: Export, key: str) -> None:
    """Write ``folder``. UserError: another task, parts that open_clip lacks, other content."""
    check_task(run, ("clip",), "open_clip")
    model, config = run.model, run.config
    assert isinstance(model, DualEncoder)
    _check(model, config)
    image, text = config.model.image_encoder, config.model.text_encoder
    preprocessing, place = _preprocessing(config), folder.resolve()
    bias = {"init_logit_bias": 0.0} if "logit_bias" in model.scalar_names else {}
    settings = {
        "model_cfg": {
            "embed_dim": config.model.projection.dim,
            **bias,
            "vision_cfg": {
                "timm_model_name": image.tag, "timm_model_pretrained": False, "timm_pool": "",
                "timm_proj": "linear", "image_size": preprocessing["size"],
            },
            "text_cfg": {
                "hf_model_name": str(place / _TEXT), "hf_tokenizer_name": str(place),
                "hf_model_pretrained": False, "hf_proj_type": "linear",
                "hf_pooler_type": _POOLERS[text.pool], "context_length": text.max_length,
            },
        },
        "preprocess_cfg": preprocessing,
    }  # fmt: skip
    with new_folder(folder, key) as made:
        write_json(made / _CONFIG, settings)
        save_file(_tensors(model), made / _WEIGHTS, metadata={"format": "pt"})
        _text_config(model).save_pretrained(made / _TEXT)
        tokenizer_of(run).save(made)  # where open_clip looks for it
        finish(made, run, "open_clip")


def _check(model: DualEncoder, config: Config) -> None:
    """Raises UserError at the first part that open_clip would build differently."""
    image, text = config.model.image_encoder, config.model.text_encoder
    plain = timm.is_model(image.tag.split(".")[0]) and image.name in ("timm", "timm_modelzoo")
    if not plain or image.param or image.patch_drop:
        raise UserError(
            "open_clip takes timm's models as they come: name: timm, no param, patch_drop: 0",
            key="model.image_encoder.param" if image.param else "model.image_encoder.name",
        )
    with torch.device("meta"):
        theirs: Any = timm.create_model(image.tag, num_classes=0)
    trunks = (model.image_encoder.model, theirs)
    ours, size = (getattr(getattr(t, "patch_embed", None), "img_size", None) for t in trunks)
    pools = [getattr(trunk, "global_pool", None) for trunk in trunks]
    if size != ours or (isinstance(pools[1], str) and pools[0] != pools[1]):
        raise UserError(
            f"open_clip builds {image.tag!r} for images of {size} with pool {pools[1]!r}, and this "
            f"run's is for {ours} with {pools[0]!r}",
            key="model.image_encoder.image_size" if size != ours else "model.image_encoder.pool",
        )
    kind = _text_config(model).model_type
    if kind not in _TEXTS or text.pool not in _POOLERS:
        raise UserError(
            f"open_clip's text encoders are {', '.join(_TEXTS)} pooled by first or mean, not "
            f"{kind} by {text.pool}",
            key="model.text_encoder.pool" if kind in _TEXTS else "model.text_encoder",
        )


def _text_config(model: DualEncoder) -> Any:
    encoder: Any = model.text_encoder
    return encoder.model.config


def _preprocessing(config: Config) -> dict[str, Any]:
    """open_clip's own transform. Raises UserError for margins, which it has in grey alone."""
    section = image_section(config)
    first = section["steps"][0]
    if first.get("how") == "pad":
        raise UserError(
            "open_clip pads with grey, not with the mean colour; take crop or resize",
            key="transforms.image_aspect_ratio",
        )
    whole = first.get("how") == "resize" or (
        first["step"] == "resize" and first["size"] == section["size"]
    )
    return {
        "size": section["size"], "mode": "RGB", "mean": section["mean"], "std": section["std"],
        "interpolation": first.get("interpolation", "bicubic"),
        "resize_mode": "squash" if whole else "shortest", "fill_color": 0,
    }  # fmt: skip


def _tensors(model: DualEncoder) -> dict[str, Tensor]:
    """Weights by open_clip's names."""
    parts: dict[str, Any] = {
        "visual.trunk.": model.image_encoder.model,
        "visual.head.proj.": model.image_projection,
        "text.transformer.": model.text_encoder.model,
        "text.proj.": model.text_projection,
    }
    found = {
        prefix + name: tensor.contiguous().clone()
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    for name in {"logit_scale", "logit_bias"} & set(model.scalar_names):
        found[name] = getattr(model, name).detach().reshape(()).clone()  # [1] here
    return found
