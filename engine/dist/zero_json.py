"""A user's own DeepSpeed JSON, read and held against what the run's YAML says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.schema import Lr, Optim
from engine.errors import UserError
from engine.registry import nearest

KEY = "dist.param.config"
_MERGED = (  # what the YAML says as well
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer", "scheduler", "bf16", "fp16", "zero_optimization"),
)
_PASSED = (  # what DeepSpeed alone knows
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
    *("comms_logger", "flops_profiler", "data_types", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer",),
)
_REFUSED = (  # within zero_optimization: shares of other kinds, and names of earlier releases
    *("mics_shard_size", "mics_hierarchical_params_gather", "zenflow"),
    *("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"),
)
_SCHEDULES = {  # DeepSpeed's name: ours
    "WarmupLR": "constant_schedule_with_warmup",
    "WarmupDecayLR": "linear_schedule_with_warmup",
    "WarmupCosineLR": "cosine_schedule_with_warmup",
}


@dataclass(frozen=True)
class ZeroJson:
    """The file's values; ``"auto"`` is as good as not there."""

    path: Path | None
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path | None) -> ZeroJson:
        """Raises UserError for a file that is none, and for settings that cannot be used here."""
        if path is None:
            return cls(None, {})
        try:
            found = json.loads(path.expanduser().read_text(encoding="utf8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", key=KEY) from error
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}", key=KEY) from error
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no object of DeepSpeed settings", key=KEY)
        for name in found:
            if name not in (*_MERGED, *_PASSED):
                known = [*_MERGED, *_PASSED]
                raise UserError(
                    f"{path}: {name} cannot be used here; remove it, or {nearest(name, known)}",
                    key=KEY,
                )
        read = cls(path, found)
        for name in read.section("zero_optimization"):
            if name in _REFUSED:
                raise UserError(
                    f"{path}: zero_optimization.{name} cannot be used here; remove it", key=KEY
                )
        return read

    def section(self, *names: str) -> dict[str, Any]:
        """An object in the file without what is ``"auto"``; {} where it is not there."""
        found: Any = self.values
        for name in names:
            found = found.get(name) or {}
            if not isinstance(found, dict):
                raise UserError(
                    f"{self.path}: {'.'.join(names)} is to be an object, not {found!r}", key=KEY
                )
        return {key: value for key, value in found.items() if value != "auto"}

    def agreed(self, name: str, key: str, ours: Any, default: Any = None) -> Any:
        """The value that the file has under ``name`` or the YAML under ``key``.

        Raises UserError where both have one and they differ.
        """
        *sections, last = name.split(".")
        theirs = self.section(*sections).get(last)
        if theirs is None:
            return default if ours is None else ours
        if ours is not None and not _equal(theirs, ours):
            raise UserError(
                f"{self.path} says {name}: {json.dumps(theirs)}, and {key} is {ours}: "
                'write "auto" there, or make them equal',
                key=KEY,
            )
        return theirs

    def low_precision(self, precision: str) -> str | None:
        """bf16 or fp16 where the file turns it on, by itself or as ``"auto"``."""
        for name in ("bf16", "fp16"):
            enabled = self.section(name).get("enabled")
            if enabled and precision != name:
                raise UserError(
                    f"{self.path} says {name}.enabled: true, and dist.precision is {precision}: "
                    'write "auto" there, or make them equal',
                    key=KEY,
                )
            automatic = (self.values.get(name) or {}).get("enabled") == "auto"
            if enabled or (automatic and precision == name):
                return name
        return None

    def check_optimizer(self, optim: Optim) -> None:
        """The optimizer is the YAML's; what the file says of it must be the same."""
        name = optim.name.removeprefix("torch.optim.")
        kind = self.section("optimizer").get("type", name)
        if str(kind).lower() != name.lower():
            self.agreed("optimizer.type", "optim.name", name)
        known = {
            "lr": optim.lr.init,
            "weight_decay": optim.param.get("weight_decay", 0.01 if name == "AdamW" else 0.0),
            "betas": list(optim.param.get("betas", (0.9, 0.999))),
            "eps": optim.param.get("eps", 1e-8),
            "momentum": optim.param.get("momentum", 0.0),
        }
        for key in self.section("optimizer", "params"):
            if key not in known:
                raise UserError(
                    f"{self.path}: optimizer.params.{key} has no counterpart in optim.param; "
                    "remove it",
                    key=KEY,
                )
            place = "optim.lr.init" if key == "lr" else f"optim.param.{key}"
            self.agreed(f"optimizer.params.{key}", place, known[key])

    def check_schedule(self, lr: Lr) -> None:
        """The schedule is the YAML's; what the file says of it must be the same."""
        kind = self.section("scheduler").get("type")
        if kind is not None and _SCHEDULES.get(kind) != lr.name:
            self.agreed("scheduler.type", "optim.lr.name", lr.name)
        steps = f"{lr.warmup_proportion:g} of all" if lr.warmup_proportion else lr.warmup_steps or 0
        known = {"warmup_min_lr": 0.0, "warmup_max_lr": lr.init, "warmup_num_steps": steps}
        for key, value in self.section("scheduler", "params").items():
            if key in known:
                place = "optim.lr.init" if key == "warmup_max_lr" else "warm-up in optim.lr"
                self.agreed(f"scheduler.params.{key}", place, known[key])
            elif (key, value) != ("warmup_type", "linear"):
                raise UserError(
                    f"{self.path} says scheduler.params.{key}: {value}; the schedule is that of "
                    'optim.lr, over epoch.total epochs: write "auto" there',
                    key=KEY,
                )

    def check_offload(self, name: str, ours: str | None) -> None:
        """Offload goes to the host's memory, and nowhere else."""
        device = self.section("zero_optimization", name).get("device")
        if device not in (None, "none", "cpu"):
            raise UserError(f"{self.path} offloads to {device}; only cpu is supported", key=KEY)
        if device is not None:
            self.agreed(f"zero_optimization.{name}.device", "dist.param.offload", ours)

    def offloads(self) -> bool:
        """Whether the file keeps anything in the host's memory."""
        names = ("offload_optimizer", "offload_param")
        return any(self.section("zero_optimization", n).get("device") == "cpu" for n in names)

    def sizes(self, hidden: int) -> dict[str, int]:
        """Those that are ``"auto"``, as transformers fills them in from the model's width."""
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        given = self.values.get("zero_optimization") or {}
        return {key: size for key, size in sizes.items() if given.get(key) == "auto"}

    def passed(self) -> dict[str, Any]:
        """What is DeepSpeed's alone."""
        return {key: value for key, value in self.section().items() if key in _PASSED}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    try:
        return abs(float(one) - float(other)) <= 1e-12 * max(abs(float(one)), abs(float(other)))
    except (TypeError, ValueError):
        return bool(one == other)
