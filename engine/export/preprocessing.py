"""The validation pipeline of a run as data: what ``images.Preprocess`` is told to do."""

from __future__ import annotations

from typing import Any

from engine.config.schema import Config
from engine.data.transforms.geometry import pair
from engine.data.transforms.pipeline import output_size
from engine.errors import UserError

_KEY = "transforms.valid_transforms"
_SIZED = ("resize", "resize_bicubic", "center_crop")


def image_section(config: Config) -> dict[str, Any]:
    """Steps, sizes and normalisation. Raises UserError for a transform that cannot be told."""
    transforms = config.transforms
    names = [name for name in transforms.valid_transforms if name != "normalize"]
    for name in names:
        if name not in _SIZED:
            raise UserError(
                f"{name} cannot be repeated where the engine is not; let the list hold "
                f"{', '.join(_SIZED)} alone",
                key=_KEY,
            )
    size = output_size(names, transforms, _KEY)
    if transforms.image_aspect_ratio is not None:
        steps = [_fit(config, names, size)]
    else:
        steps = [_step(config, name) for name in names]
    return {
        "size": list(size),
        "steps": steps,
        "mean": list(transforms.normalize.mean),
        "std": list(transforms.normalize.std),
        "max_pixels": config.data.max_image_pixels,
    }


def _step(config: Config, name: str) -> dict[str, Any]:
    section = getattr(config.transforms, name)
    if name == "center_crop":
        return {"step": name, "size": list(pair(section.size))}
    size = section.size if isinstance(section.size, int) else list(section.size)
    return {"step": "resize", "size": size, "interpolation": section.interpolation}


def _fit(config: Config, names: list[str], size: tuple[int, int]) -> dict[str, Any]:
    """One step in place of all resizes and crops, as the pipeline has it."""
    transforms = config.transforms
    sections = [getattr(transforms, name) for name in names]
    ways = [section.interpolation for section in sections if hasattr(section, "interpolation")]
    return {
        "step": "fit",
        "how": transforms.image_aspect_ratio,
        "size": list(size),
        "interpolation": ways[0] if ways else transforms.resize_bicubic.interpolation,
        "colour": [int(255 * value) for value in transforms.normalize.mean],
    }
