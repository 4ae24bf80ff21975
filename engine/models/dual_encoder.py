"""The dual encoder: two towers, two bias-free projections, one space (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.towers import ImageModel, Tower
from engine.types import Batch, Mix


class DualEncoder(ImageModel):
    """Images and texts to L2-normalised features of one width, beside the loss's shared scalars.

    Args:
        image_encoder, text_encoder: called with normalised images, or token ids and their mask.
        projection_dim: width of the common space.
        scalars: name → (initial value, whether it is learned), as the loss declares them.
        bounds: name → (least, greatest) value that ``constrain`` keeps a scalar to.
        mean, std: of the image channels, for values in 0…1.
    """

    def __init__(
        self,
        image_encoder: Tower,
        text_encoder: Tower,
        projection_dim: int,
        scalars: Mapping[str, tuple[float, bool]],
        bounds: Mapping[str, tuple[float | None, float | None]],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(mean, std)
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection = _projection(image_encoder, projection_dim)
        self.text_projection = _projection(text_encoder, projection_dim)
        self.scalar_names = tuple(scalars)
        self.bounds = dict(bounds)
        for name, (value, learned) in scalars.items():
            scalar = torch.tensor([float(value)])  # [1]: what sharding wrappers can hold
            if learned:
                self.register_parameter(name, nn.Parameter(scalar))
            else:
                self.register_buffer(name, scalar)

    def forward(self, batch: Batch, mix: Mix | None = None) -> dict[str, Tensor]:
        """Features of what ``batch`` holds, in fp32 or wider, and the shared scalars.

        Takes ``image_BCHW`` (uint8; floating point is taken as normalised already), and
        ``input_ids_BT`` with ``attention_mask_BT``. Gives ``image_BD``, ``text_BD``, each where its
        input is there, each scalar by its name, and with ``mix`` also ``partner_offset_B`` (int64,
        the row of a sample's mixing partner less its own).
        """
        # copies: a parameter may be shared out again once the pass is over
        outputs = {name: getattr(self, name).clone() for name in self.scalar_names}
        if mix is not None:
            rows = len(next(batch[key] for key in ("image_BCHW", "input_ids_BT") if key in batch))
            device = self.mean_C11.device
            offset_B = outputs["partner_offset_B"] = partner_offsets(mix, rows, device)
            partner_B = torch.arange(rows, device=device) + offset_B
        if "image_BCHW" in batch:
            image_BCHW = self.normalise(batch["image_BCHW"])
            if mix is not None and mix.image:
                image_BCHW = _blend(image_BCHW, partner_B, mix.lam)
            feature_BD = _widen(self.image_projection(self.image_encoder(image_BCHW)))
            outputs["image_BD"] = F.normalize(feature_BD, dim=-1)
        if "input_ids_BT" in batch:
            hidden_BD = self.text_encoder(batch["input_ids_BT"], batch["attention_mask_BT"])
            feature_BD = _widen(self.text_projection(hidden_BD))
            if mix is not None and mix.text:
                feature_BD = _blend(feature_BD, partner_B, mix.lam)
            outputs["text_BD"] = F.normalize(feature_BD, dim=-1)
        return outputs

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring the shared scalars back within their bounds; called after each optimizer step."""
        for name, (least, greatest) in self.bounds.items():
            getattr(self, name).clamp_(least, greatest)


def partner_offsets(mix: Mix, rows: int, device: torch.device | None = None) -> Tensor:
    """Row of each sample's partner less its own row, int64 [B]; the same for the same ``mix``."""
    if mix.partner == "reversed":
        partner_B = torch.arange(rows - 1, -1, -1, device=device)
    else:
        # drawn on the CPU from a generator of its own: equal on all devices, no state disturbed
        generator = torch.Generator().manual_seed(mix.seed)
        partner_B = torch.randperm(rows, generator=generator).to(device)
    return partner_B - torch.arange(rows, device=device)


def _blend(rows_B: Tensor, partner_B: Tensor, lam: float) -> Tensor:
    return lam * rows_B + (1 - lam) * rows_B[partner_B]


def _widen(feature_BD: Tensor) -> Tensor:
    """Out of half precision, in which squares of small numbers vanish."""
    return feature_BD if feature_BD.dtype == torch.float64 else feature_BD.float()


def _projection(encoder: Tower, dim: int) -> nn.Linear:
    projection = nn.Linear(encoder.width, dim, bias=False)
    nn.init.normal_(projection.weight, std=encoder.width**-0.5)
    return projection
