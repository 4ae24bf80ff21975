"""DeepSpeed's settings, made from the run's configuration and a JSON file that a user may have.

What the YAML says is written into the JSON, ``"auto"`` is filled in from it, and where both name a
value they must agree. Nothing here imports deepspeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
_OFFLOADS = ("offload_optimizer", "offload_param")
_SECTIONS = ("optimizer", "scheduler", "bf16", "fp16", "zero_optimization")
_SHARED = (  # what the YAML says as well
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", *_SECTIONS),
)
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
        self.json = _read(self.param.config)
        self._compare()
        stage = self.param.zero_stage
        self.stage: int = self._zero().get("stage", 2) if stage is None else stage
        self.weights = self._weights()
        self._check_optimizer()
        if self.stage == 3 and config.runner.compile:
            raise UserError(
                "ZeRO-3 fetches weights between layers, which a compiled model leaves no room "
                "for; set runner.compile: false, or zero_stage: 2",
                key="runner.compile",
            )
        if self.stage == 0:
            self._check_stage_0()

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in the host's memory."""
        places = (self._zero().get(name, {}) for name in _OFFLOADS)
        return self.param.offload is not None or any(p.get("device") == "cpu" for p in places)

    def resolved(self, trained: int, hidden: int) -> dict[str, Any]:
        """What deepspeed.initialize is given.

        Args:
            trained: elements of all trained parameters.
            hidden: the model's width, for the sizes that are ``"auto"``.
        """
        config, batch = self.config, self.config.data.batch_size
        given = _without_auto(self.json)
        zero: dict[str, Any] = {
            "memory_efficient_linear": False,  # else torch's own linear is replaced, for good
            "reduce_bucket_size": min(_BUCKET, max(trained, 2)),  # allocated whole
            **self._zero(),
            **self._automatic_sizes(hidden),
            "stage": self.stage,
        }
        if self.param.offload:
            place = {"device": self.param.offload, "pin_memory": True}
            for name in _OFFLOADS[: 2 if self.stage == 3 else 1]:
                zero[name] = {**place, **self._zero().get(name, {})}
        return {
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
            **{name: value for name, value in given.items() if name in _PASSED},
            "zero_allow_untested_optimizer": True,  # which ones will do is checked here
            "zero_optimization": zero,
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // self.world,
            "gradient_accumulation_steps": 1,  # sub-batches are the step's own affair
            "gradient_clipping": config.optim.grad_clip or 0.0,
            **{
                name: {**given.get(name, {}), "enabled": self.weights == name}
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

    def _zero(self) -> dict[str, Any]:
        return _without_auto(self.json.get("zero_optimization", {}))

    def _automatic_sizes(self, hidden: int) -> dict[str, int]:
        """As transformers fills them in from the model's width."""
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        given = self.json.get("zero_optimization", {})
        return {name: size for name, size in sizes.items() if given.get(name) == "auto"}

    def _compare(self) -> None:
        """Every value of the file against the YAML's: equal where both name it."""
        ours = self._named_by_both()
        for name, theirs in _leaves(self.json):
            section, _, last = name.rpartition(".")
            meant = _SCHEDULES.get(theirs, theirs) if name == "scheduler.type" else theirs
            if name in ours:
                key, value = ours[name]
                if value is not None and not _equal(meant, value):
                    raise self._fault(f"says {name}: {json.dumps(theirs)}, and {key} is {value}: "
                                      'write "auto" there, or make them equal')  # fmt: skip
            elif section == "optimizer.params":
                raise self._fault(f": {name} has no counterpart in optim.param; remove it")
            elif section == "scheduler.params" and (last, theirs) != ("warmup_type", "linear"):
                raise self._fault(f"says {name}: {theirs}; the schedule is that of optim.lr, over "
                                  'epoch.total epochs: write "auto" there')  # fmt: skip
            if name in ours and last == "device" and theirs not in (None, "none", "cpu"):
                raise self._fault(f"offloads to {theirs}; only cpu is supported")

    def _named_by_both(self) -> dict[str, tuple[str, Any]]:
        """Name in the file: the YAML's key, and its value (None: the file's is taken)."""
        data, optim, lr = self.config.data, self.config.optim, self.config.optim.lr
        kind, param = optim.name.removeprefix("torch.optim."), self.param
        parts = 1
        if self.config.runner.name in ("dga", "clip_bsgs") and data.batch_size_train:
            parts = -(-data.batch_size // data.batch_size_train)
        share = f"data.batch_size by {self.world} processes"
        warmup = f"{lr.warmup_proportion:g} of all" if lr.warmup_proportion else lr.warmup_steps
        params = {
            "weight_decay": 0.01 if kind == "AdamW" else 0.0,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "momentum": 0.0,
            **optim.param,
        }
        return {
            "train_batch_size": ("data.batch_size", data.batch_size),
            "gradient_accumulation_steps": ("data.batch_size by data.batch_size_train", parts),
            "train_micro_batch_size_per_gpu": (
                f"{share} and {parts} sub-batches" if parts > 1 else share,
                data.batch_size // (self.world * parts),
            ),
            "gradient_clipping": ("optim.grad_clip", optim.grad_clip or 0.0),
            "zero_optimization.stage": ("dist.param.zero_stage", param.zero_stage),
            "zero_optimization.offload_optimizer.device": ("dist.param.offload", param.offload),
            "zero_optimization.offload_param.device": ("dist.param.offload", param.offload),
            "optimizer.type": ("optim.name", kind),
            "optimizer.params.lr": ("optim.lr.init", lr.init),
            **{
                f"optimizer.params.{name}": (
                    f"optim.param.{name}",
                    list(params[name]) if name == "betas" else params[name],
                )
                for name in ("weight_decay", "betas", "eps", "momentum")
            },
            "scheduler.type": ("optim.lr.name", lr.name),
            "scheduler.params.warmup_min_lr": ("warm-up in optim.lr", 0.0),
            "scheduler.params.warmup_max_lr": ("optim.lr.init", lr.init),
            "scheduler.params.warmup_num_steps": ("warm-up in optim.lr", warmup or 0),
        }

    def _weights(self) -> str:
        """The weights' format in the passes; where it is a low one, fp32 ones are kept as well."""
        precision = self.precision
        if precision == "fp64":
            raise UserError("DeepSpeed keeps weights in fp32 at best; take bf16 or fp32",
                            key="dist.precision")  # fmt: skip
        wanted = None
        for name in ("bf16", "fp16"):
            enabled = self.json.get(name, {}).get("enabled")
            if enabled not in (None, False, "auto") and precision != name:
                raise self._fault(f"says {name}.enabled: true, and dist.precision is {precision}: "
                                  'write "auto" there, or make them equal')  # fmt: skip
            if enabled and precision == name:
                wanted = name
        found: str = self.param.weights or wanted or ("fp16" if precision == "fp16" else "fp32")
        if wanted not in (None, found):
            raise self._fault(f"says {wanted}.enabled, and dist.param.weights is {found}: leave "
                              "one of them out")  # fmt: skip
        if found not in ("fp32", precision) or (precision == "fp16" and found == "fp32"):
            # of fp16 weights alone DeepSpeed scales the loss
            raise UserError(
                f"weights in {found} cannot be combined with dist.precision {precision}; leave "
                "the key out",
                key="dist.param.weights",
            )
        return found

    def _check_stage_0(self) -> None:
        """Stage 0 is torch's DDP, which keeps weights in fp32 where they are."""
        remedy = "stage 0 shards nothing, and nothing can be {}; take zero_stage: 1, 2 or 3"
        if self.offloads:
            raise UserError(remedy.format("offloaded"), key="dist.param.zero_stage")
        if self.param.weights not in (None, "fp32"):
            raise UserError(remedy.format(f"kept in {self.param.weights} beside fp32"),
                            key="dist.param.weights")  # fmt: skip

    def _check_optimizer(self) -> None:
        name = self.config.optim.name.removeprefix("torch.optim.")
        if name not in _ELEMENTWISE and not self.json.get("zero_allow_untested_optimizer"):
            raise UserError(
                "ZeRO splits parameters anywhere, so that an optimizer must treat each element by "
                f"itself, which {name} is not known to; take one of {', '.join(_ELEMENTWISE)}",
                key="optim.name",
            )

    def _fault(self, message: str) -> UserError:
        space = "" if message.startswith(":") else " "
        return UserError(f"{self.param.config}{space}{message}", key=KEY)


def _read(path: Path | None) -> dict[str, Any]:
    """Raises UserError for a file that is not DeepSpeed's, and for settings that are not usable."""
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
    known = [*_SHARED, *_PASSED]
    for name in found:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"{path}: {name} cannot be used here; remove it, or {hint}", key=KEY)
    _require_objects(found, _SECTIONS, path)
    zero = found.get("zero_optimization", {})
    _require_objects(zero, _OFFLOADS, path, "zero_optimization.")
    for name in zero:
        if name in _REFUSED:
            raise UserError(
                f"{path}: zero_optimization.{name} cannot be used here; remove it", key=KEY
            )
    return found


def _require_objects(
    values: dict[str, Any], names: Sequence[str], path: Path, prefix: str = ""
) -> None:
    """Those of ``names`` that are there are objects; null is as good as an empty one."""
    for name in names:
        if name in values and not isinstance(values[name] or {}, dict):
            raise UserError(
                f"{path}: {prefix}{name} must be an object, not {values[name]!r}", key=KEY
            )
        if name in values:
            values[name] = values[name] or {}


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != "auto"
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested objects by its dotted name, without what is ``"auto"``."""
    for name, value in _without_auto(values).items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    try:
        return abs(float(one) - float(other)) <= 1e-12 * max(abs(float(one)), abs(float(other)))
    except (TypeError, ValueError):
        return bool(one == other)
