"""DeepSpeed's settings, made from the run's configuration and a JSON file that a user may have.

What the YAML says is written into the JSON, ``"auto"`` is filled in from it, and where both name a
value they must agree. Nothing here imports deepspeed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from engine.config.explain import validated
from engine.config.schema import Config
from engine.config.section import Section
from engine.errors import UserError
from engine.registry import nearest

KEY = "dist.param.config"
_ELEMENTWISE = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "Adadelta")
_BUCKET = 50_000_000  # elements; a tenth of DeepSpeed's, of which a step would hold 2 GB
_PASSED = (  # what DeepSpeed alone knows; it would ignore any other name silently
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
    *("comms_logger", "flops_profiler", "data_types", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer",),
)
_REFUSED = (  # within zero_optimization: other kinds of shards, and names of earlier releases
    *("mics_shard_size", "mics_hierarchical_params_gather", "zenflow"),
    *("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"),
)
_OFFLOADS = ("offload_optimizer", "offload_param")
_PARTLY = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
_SCHEDULES = {  # DeepSpeed's name: ours
    "WarmupLR": "constant_schedule_with_warmup",
    "WarmupDecayLR": "linear_schedule_with_warmup",
    "WarmupCosineLR": "cosine_schedule_with_warmup",
}


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
        self.param = validated(Param, config.dist.param, "dist.param")
        self.raw = _read(self.param.config)
        self.json = _given(self.raw)
        self._compare()
        self.zero: dict[str, Any] = self.json.get("zero_optimization", {})
        stage = self.param.zero_stage
        self.stage: int = self.zero.get("stage", 2) if stage is None else stage
        self.weights = self._weights()
        if self.param.offload:
            place = {"device": self.param.offload, "pin_memory": True}
            for name in _OFFLOADS[: 2 if self.stage == 3 else 1]:
                self.zero[name] = place | self.zero.get(name, {})
        places = {name: self.zero.get(name, {}).get("device") for name in _OFFLOADS}
        self.offloads = [name for name, device in places.items() if device == "cpu"]
        self._check()

    def resolved(self, trained: int, hidden: int) -> dict[str, Any]:
        """What deepspeed.initialize is given.

        Args:
            trained: elements of all trained parameters.
            hidden: the model's width, for the sizes that are ``"auto"``.
        """
        batch, given = self.config.data.batch_size, self.raw.get("zero_optimization") or {}
        automatic = {  # as transformers fills them in
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        zero: dict[str, Any] = {
            "memory_efficient_linear": False,  # else torch's own linear is replaced, for good
            "reduce_bucket_size": min(_BUCKET, max(trained, 2)),  # allocated whole
            **self.zero,
            **{name: size for name, size in automatic.items() if given.get(name) == "auto"},
            "stage": self.stage,
        }
        low = {
            name: {**self.json.get(name, {}), "enabled": self.weights == name}
            for name in ("bf16", "fp16")
        }
        return {
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
            **{name: value for name, value in self.json.items() if name in _PASSED},
            "zero_allow_untested_optimizer": True,  # which ones will do is checked here
            "zero_optimization": zero,
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // self.world,
            "gradient_accumulation_steps": 1,  # sub-batches are the step's own affair
            "gradient_clipping": self.config.optim.grad_clip or 0.0,
            **low,
        }

    def device_bytes(self, whole: Mapping[str, int]) -> Mapping[str, int]:
        """What one device holds of ``whole`` weights, gradients and optimizer, by DDP in fp32."""
        if self.stage == 0:
            return whole
        low = 1 if self.weights == "fp32" else 2
        found = {
            "optimizer": whole["optimizer"] + whole["gradients"],  # with the fp32 weights it moves
            "gradients": whole["gradients"] // low,
            "weights": whole["weights"] // low,
        }
        for name in list(found)[: self.stage]:
            found[name] //= self.world
        moved = dict(zip(_OFFLOADS, ("optimizer", "weights"), strict=True))
        return found | {moved[name]: 0 for name in self.offloads}

    def _compare(self) -> None:
        """Every value of the file against the YAML's: equal where both name it."""
        ours = self._named_by_both()
        for name, theirs in _leaves(self.json):
            place, says = name.split("."), f"says {name}: {json.dumps(theirs)}"
            if name in ours:
                key, value = ours[name]
                meant = _SCHEDULES.get(theirs, theirs) if name == "scheduler.type" else theirs
                if value is not None and not _equal(meant, value):
                    raise self._fault(f'{says}, and {key} is {value}: write "auto" there, or make '
                                      "them equal")  # fmt: skip
                if place[-1] == "device" and theirs not in ("none", "cpu"):
                    raise self._fault(f"offloads to {theirs}; only cpu is supported")
            elif not _usable(*place, empty=theirs == {}):
                hint = nearest(name, [*ours, *_PASSED, *_PARTLY])
                raise self._fault(f"{says}, which cannot be used here; remove it, or {hint}")

    def _named_by_both(self) -> dict[str, tuple[str, Any]]:
        """Name in the file: the YAML's key, and its value (None: the file's is taken)."""
        data, optim, lr = self.config.data, self.config.optim, self.config.optim.lr
        kind, offload = optim.name.removeprefix("torch.optim."), self.param.offload
        parts = 1
        if self.config.runner.name in ("dga", "clip_bsgs") and data.batch_size_train:
            parts = -(-data.batch_size // data.batch_size_train)
        share = f"data.batch_size by {self.world} processes"
        share += f" and {parts} sub-batches" if parts > 1 else ""
        warmup = f"{lr.warmup_proportion:g} of all" if lr.warmup_proportion else lr.warmup_steps
        params: dict[str, Any] = {"eps": 1e-8, "betas": (0.9, 0.999), "momentum": 0.0}
        params = {"weight_decay": 0.01 if kind == "AdamW" else 0.0, **params, **optim.param}
        params["betas"] = list(params["betas"])
        precision, low = self.precision, ("bf16.enabled", "fp16.enabled")
        enabled = [name for name, value in _leaves(self.json) if name in low and value]
        return {
            "train_batch_size": ("data.batch_size", data.batch_size),
            "gradient_accumulation_steps": ("data.batch_size by data.batch_size_train", parts),
            "train_micro_batch_size_per_gpu": (share, data.batch_size // (self.world * parts)),
            "gradient_clipping": ("optim.grad_clip", optim.grad_clip or 0.0),
            "zero_optimization.stage": ("dist.param.zero_stage", self.param.zero_stage),
            "zero_optimization.offload_optimizer.device": ("dist.param.offload", offload),
            "zero_optimization.offload_param.device": ("dist.param.offload", offload),
            "optimizer.type": ("optim.name", kind),
            "optimizer.params.lr": ("optim.lr.init", lr.init),
            **{f"optimizer.params.{n}": (f"optim.param.{n}", v) for n, v in params.items()},
            "scheduler.type": ("optim.lr.name", lr.name),
            "scheduler.params.warmup_min_lr": ("warm-up in optim.lr", 0.0),
            "scheduler.params.warmup_max_lr": ("optim.lr.init", lr.init),
            "scheduler.params.warmup_num_steps": ("warm-up in optim.lr", warmup or 0),
            "scheduler.params.warmup_type": ("warm-up in optim.lr", "linear"),
            **{n: ("dist.precision", n.startswith(precision) or precision) for n in enabled},
        }

    def _weights(self) -> str:
        """The weights' format in the passes; where it is a low one, fp32 ones are kept as well."""
        precision = self.precision
        if precision == "fp64":
            raise UserError("DeepSpeed keeps weights in fp32 at best; take bf16 or fp32",
                            key="dist.precision")  # fmt: skip
        wanted = precision if (self.raw.get(precision) or {}).get("enabled") else None
        found: str = self.param.weights or wanted or ("fp16" if precision == "fp16" else "fp32")
        if wanted not in (None, found):
            raise self._fault(f"says {wanted}.enabled, and dist.param.weights is {found}: leave "
                              "one of them out")  # fmt: skip
        if found not in ("fp32", precision) or (precision == "fp16" and found == "fp32"):
            # of fp16 weights alone DeepSpeed scales the loss
            message = f"weights in {found} cannot be combined with dist.precision {precision}"
            raise UserError(f"{message}; leave the key out", key="dist.param.weights")
        return found

    def _check(self) -> None:
        name = self.config.optim.name.removeprefix("torch.optim.")
        if name not in _ELEMENTWISE and not self.json.get("zero_allow_untested_optimizer"):
            raise UserError(
                "ZeRO splits parameters anywhere, so that an optimizer must treat each element by "
                f"itself, which {name} is not known to; take one of {', '.join(_ELEMENTWISE)}",
                key="optim.name",
            )
        if self.stage == 3 and self.config.runner.compile:
            raise UserError(
                "ZeRO-3 fetches weights between layers, which a compiled model leaves no room "
                "for; set runner.compile: false, or zero_stage: 2",
                key="runner.compile",
            )
        if self.stage == 0:  # torch's DDP, which keeps weights in fp32 where they are
            remedy = "stage 0 shards nothing, and nothing can be {}; take zero_stage: 1, 2 or 3"
            if self.offloads:
                raise UserError(remedy.format("offloaded"), key="dist.param.zero_stage")
            if self.param.weights not in (None, "fp32"):
                raise UserError(remedy.format(f"kept in {self.param.weights} beside fp32"),
                                key="dist.param.weights")  # fmt: skip

    def _fault(self, message: str) -> UserError:
        return UserError(f"{self.param.config} {message}", key=KEY)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.expanduser().read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", key=KEY) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", key=KEY) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object of DeepSpeed settings", key=KEY)
    return found


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects without what is ``"auto"`` or null."""
    return {
        name: _given(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None and value != "auto"
    }


def _usable(top: str, *inside: str, empty: bool) -> bool:
    """Whether DeepSpeed may be given what the file alone names."""
    if top not in _PARTLY:
        return top in _PASSED
    if not inside:
        return empty  # a section is an object
    wrong = inside[0] in _REFUSED or (inside[0] in _OFFLOADS and not (inside[1:] or empty))
    return empty or not (wrong or top in ("optimizer", "scheduler"))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested objects by its dotted name; an empty one is its own."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-12)
    except (TypeError, ValueError):
        return bool(one == other)
