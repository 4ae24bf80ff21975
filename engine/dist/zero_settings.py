"""DeepSpeed's settings, made of the run's configuration and of a JSON file that a user has.

What the YAML says is laid into the JSON, ``"auto"`` is filled in from it, and where both say a
thing they must agree. Nothing here imports deepspeed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from engine.config.schema import Config, Section
from engine.dist.zero_json import KEY, ZeroJson
from engine.errors import UserError
from engine.registry import nearest

_ELEMENTWISE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "Adadelta")
_BUCKET = 50_000_000  # elements; a tenth of DeepSpeed's, of which a step would hold 2 GB


class Param(Section):
    """``dist.param`` of ``dist.name: deepspeed``."""

    zero_stage: Literal[0, 1, 2, 3] | None = None  # default: the JSON's, else 2
    offload: Literal["cpu"] | None = None  # optimizer state, at stage 3 the weights as well
    weights: Literal["fp32", "bf16", "fp16"] | None = None  # in the passes; fp32 is always kept
    config: Path | None = None  # a DeepSpeed JSON


class Settings:
    """Checked when made. Raises UserError that names both values where two places disagree."""

    def __init__(self, config: Config, world: int, precision: str) -> None:
        self.config, self.world, self.precision = config, world, precision
        self.param = _param(config.dist.param)
        self.json = ZeroJson.read(self.param.config)
        self.stage: int = self.json.agreed(
            "zero_optimization.stage", "dist.param.zero_stage", self.param.zero_stage, default=2
        )
        self.weights = self._weights()
        self._check_optimizer()
        self.json.check_optimizer(config.optim)
        self.json.check_schedule(config.optim.lr)
        self._check_batch()
        for name in ("offload_optimizer", "offload_param"):
            self.json.check_offload(name, self.param.offload)
        self.json.agreed("gradient_clipping", "optim.grad_clip", config.optim.grad_clip or 0.0)
        if self.stage == 3 and config.runner.compile:
            raise UserError(
                "ZeRO-3 fetches weights between layers, which a compiled model leaves no room "
                "for; set runner.compile: false, or zero_stage: 2",
                key="runner.compile",
            )
        if self.stage == 0:
            self._check_unshared()

    @property
    def offloads(self) -> bool:
        """Whether anything is to be kept in the host's memory."""
        return self.param.offload is not None or self.json.offloads()

    def resolved(self, trained: int, hidden: int) -> dict[str, Any]:
        """What deepspeed.initialize is given.

        Args:
            trained: elements of all trained parameters.
            hidden: the model's width, for the sizes that are ``"auto"``.
        """
        config, given = self.config, self.json.section("zero_optimization")
        zero: dict[str, Any] = {
            "memory_efficient_linear": False,  # else torch's own linear is replaced, for good
            "reduce_bucket_size": min(_BUCKET, max(trained, 2)),  # allocated whole
            **given,
            **self.json.sizes(hidden),
            "stage": self.stage,
        }
        if self.param.offload:
            place = {"device": self.param.offload, "pin_memory": True}
            for name in ("offload_optimizer", "offload_param")[: 2 if self.stage == 3 else 1]:
                zero[name] = {**place, **self.json.section("zero_optimization", name)}
        batch = config.data.batch_size
        return {
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
            **self.json.passed(),
            "zero_allow_untested_optimizer": True,  # which ones will do is checked here
            "zero_optimization": zero,
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // self.world,
            "gradient_accumulation_steps": 1,  # sub-batches are the step's own affair
            "gradient_clipping": config.optim.grad_clip or 0.0,
            **{
                name: {**self.json.section(name), "enabled": self.weights == name}
                for name in ("bf16", "fp16")
            },
        }

    def device_bytes(self, whole: Mapping[str, int]) -> dict[str, int]:
        """What one device holds of ``whole`` weights, gradients and optimizer, by DDP in fp32."""
        if self.stage == 0:
            return dict(whole)
        low = 1 if self.weights == "fp32" else 2
        found = {
            "optimizer": whole["optimizer"] + whole["gradients"],  # with the fp32 weights it moves
            "gradients": whole["gradients"] // low,
            "weights": whole["weights"] // low,
        }
        for name in list(found)[: self.stage]:
            found[name] //= self.world
        zero = self.resolved(1, 1)["zero_optimization"]
        for name, place in (("optimizer", "offload_optimizer"), ("weights", "offload_param")):
            if zero.get(place, {}).get("device") == "cpu":
                found[name] = 0
        return found

    def _weights(self) -> str:
        """The weights' format in the passes; where it is a low one, fp32 ones are kept as well."""
        precision = self.precision
        if precision == "fp64":
            raise UserError("DeepSpeed keeps weights in fp32 at best; take bf16 or fp32",
                            key="dist.precision")  # fmt: skip
        wanted = self.json.low_precision(precision)
        default = "fp16" if precision == "fp16" else "fp32"
        found: str = self.param.weights or wanted or default
        if wanted not in (None, found):
            raise UserError(
                f"{self.param.config} says {wanted}.enabled, and dist.param.weights is {found}: "
                "leave one of them out",
                key=KEY,
            )
        if found not in ("fp32", precision) or (precision == "fp16" and found == "fp32"):
            # of fp16 weights alone DeepSpeed scales the loss
            raise UserError(
                f"weights in {found} do not go with dist.precision {precision}; leave it out",
                key="dist.param.weights",
            )
        return found

    def _check_unshared(self) -> None:
        """Stage 0 is torch's DDP, which keeps weights in fp32 where they are."""
        remedy = "at stage 0 nothing is shared out, and so nothing {}; take zero_stage: 1, 2 or 3"
        if self.offloads:
            raise UserError(remedy.format("offloaded"), key="dist.param.zero_stage")
        if self.param.weights not in (None, "fp32"):
            raise UserError(remedy.format(f"kept in {self.param.weights} beside fp32"),
                            key="dist.param.weights")  # fmt: skip

    def _check_optimizer(self) -> None:
        name = self.config.optim.name.removeprefix("torch.optim.")
        if name not in _ELEMENTWISE and not self.json.values.get("zero_allow_untested_optimizer"):
            raise UserError(
                f"ZeRO cuts parameters anywhere, so that an optimizer must treat each element for "
                f"itself, which {name} is not known to; take one of {', '.join(_ELEMENTWISE)}",
                key="optim.name",
            )

    def _check_batch(self) -> None:
        data, parts = self.config.data, 1
        if self.config.runner.name in ("dga", "clip_bsgs") and data.batch_size_train:
            parts = -(-data.batch_size // data.batch_size_train)
        shared = f"data.batch_size by {self.world} processes"
        self.json.agreed("train_batch_size", "data.batch_size", data.batch_size)
        self.json.agreed(
            "gradient_accumulation_steps", "data.batch_size by data.batch_size_train", parts
        )
        self.json.agreed(
            "train_micro_batch_size_per_gpu",
            f"{shared} and {parts} sub-batches" if parts > 1 else shared,
            data.batch_size // (self.world * parts),
        )


def width(model: nn.Module) -> int:
    """The model's hidden size: of its widest normalisation."""
    sizes = [
        parameter.numel()
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    ]
    return max(sizes, default=1024)


def _param(given: dict[str, Any]) -> Param:
    for name in given:
        if name not in Param.model_fields:
            raise UserError(
                f"dist.name deepspeed has no param {name!r}; "
                f"{nearest(name, list(Param.model_fields))}",
                key=f"dist.param.{name}",
            )
    try:
        return Param(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = str(first["loc"][0])
        raise UserError(f"{first['msg']}, not {first['input']!r}",
                        key=f"dist.param.{place}") from error  # fmt: skip


def prepare_process(device: torch.device) -> None:
    """What DeepSpeed looks for in the environment, and what is not to be heard of it."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when it is imported
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # of torch, at each call of DeepSpeed's
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
