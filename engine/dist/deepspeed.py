"""ZeRO by DeepSpeed: optimizer state, gradients and weights sharded over the ranks.

Rajbhandari et al. 2020, arXiv:1910.02054. Stage 1 shards the optimizer's state, 2 the gradients
too, 3 the weights as well; stage 0 shards nothing and is torch's DDP. The optimizer, its groups,
the schedule and the checkpoints are the engine's own at every stage.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from engine import registry
from engine.config.schema import Config, Dist
from engine.dist import collectives
from engine.dist.launch import join_alone
from engine.dist.parallel import (
    Bytes,
    Parallel,
    Sharded,
    State,
    Weights,
    at_rank_0,
    constrain,
    refuse_batch_norm,
    refuse_offload,
)
from engine.dist.zero_settings import KEY, Settings
from engine.errors import UserError

SHARDS = True
_RELEASE = "0.19."  # internal parts of it are called
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(config: Config, device: torch.device, precision: str) -> None:
    """Raises UserError for whatever cannot work, before any data is read."""
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install -e '.[deepspeed]', or take "
                        "dist.name: torch", key="dist.name")  # fmt: skip
    settings = Settings(config, collectives.world(), precision)
    refuse_offload(bool(settings.offloads), device)
    if not (found := version("deepspeed")).startswith(_RELEASE):
        raise UserError(f"DeepSpeed {found} is installed, and this is written for {_RELEASE}x: "
                        "pip install -e '.[deepspeed]'", key="dist.name")  # fmt: skip
    _prepare_process(device)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if settings.weights == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(f"DeepSpeed has no fp16 on {device.type}; take bf16 or fp32",
                        key="dist.precision")  # fmt: skip
    try:
        DeepSpeedZeroConfig(**settings.resolved(1, 1)["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{settings.param.config}: {place}: {first['msg']}", key=KEY) from error


def device_bytes(config: Config, precision: str, world: int, whole: Bytes) -> Bytes:
    """What one device holds of ``whole``, which is that of DDP in fp32."""
    return Settings(config, world, precision).device_bytes(whole)


def build(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    device: torch.device,
    precision: str,
) -> Parallel:
    """``module`` and its ``optimizer``, sharded; ``dist.param`` is described by ``Param``."""
    settings = Settings(config, collectives.world(), precision)
    if settings.stage == 0:
        plain = config.model_copy(update={"dist": Dist()})
        return registry.find("dist", "torch").build(module, optimizer, plain, device, precision)
    refuse_batch_norm(module, settings.weights)
    return ZeRO(module, optimizer, settings, device)


def _prepare_process(device: torch.device) -> None:
    """What DeepSpeed reads from the environment, and a warning of its own calls to suppress."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # read when it is imported
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # by torch, at each call that DeepSpeed makes
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def width(model: nn.Module) -> int:
    """The model's hidden size: of its widest normalisation."""
    sizes = [
        parameter.numel()
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    ]
    return max(sizes, default=1024)


class _Cast(nn.Module):
    """The model under autocast, which DeepSpeed leaves before it calls what it is given."""

    def __init__(self, module: nn.Module, kind: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module, self.kind, self.dtype = module, kind, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype is not None):
            return self.module(*args, **kwargs)


class ZeRO(Sharded):
    """A model and its optimizer in DeepSpeed's hands, stages 1 to 3.

    ``wrapped`` is DeepSpeed's engine, ``zero`` its optimizer. The groups of torch's optimizer
    within that hold flat shards in place of parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        device: torch.device,
    ) -> None:
        super().__init__()
        _prepare_process(device)
        join_alone(device)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # An extension for inference, which it would compile for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage, self.low = settings.stage, settings.weights != "fp32"
        self.lockstep = settings.stage == 3
        self.scales_loss = settings.weights == "fp16"
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.sizes = [len(group) for group in groups]
        self.trained: list[Any] = [parameter for group in groups for parameter in group]
        self.scalars = [parameter for parameter in self.trained if parameter.numel() == 1]
        config = settings.resolved(sum(p.numel() for p in self.trained), width(module))
        deepspeed.init_distributed(
            dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        if self.stage == 3:  # tensor by tensor: all of them might not fit
            low = DTYPES.get(settings.weights, torch.float32)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(low)
            deepspeed.zero.Init(module, config_dict_or_path=config)
            module.to(device)  # buffers
        self.wrapped: Any = deepspeed.initialize(
            model=_Cast(module, device.type, DTYPES.get(settings.precision)),
            optimizer=optimizer,
            config=config,
            dist_init_required=False,
        )[0]
        self.optimizer = self.wrapped.basic_optimizer
        self.zero: Any = self.wrapped.optimizer
        self.utils, self.gather = deepspeed.utils, deepspeed.zero.GatheredParameters

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The model as it was built."""
        return self.wrapped.module.module

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zero.zero_grad(set_to_none)

    def hold(self) -> AbstractContextManager[None]:
        """Gradients stay whole on every rank within it, also where ZeRO would shard them."""
        return self.wrapped.coalesce_grad_reduction()

    def backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None
    ) -> None:
        loss = outputs[0]
        if gradients is not None:  # DeepSpeed takes a scalar; the gradient of Σ⟨z, g⟩ at z is g
            pairs = zip(outputs, gradients, strict=True)
            loss = torch.stack([(z * g).sum() for z, g in pairs]).sum()
        self.wrapped.backward(loss)

    def clip(self, max_norm: float | None) -> float:
        """The norm; ``update`` clips by the bound that DeepSpeed was set up with."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self.stage == 3:
            norm = float(combine_grad_norm_groups(self.zero._get_norm_groups()))
        else:
            norm = float(self.zero.scaled_global_norm())
        return norm / self.zero.loss_scale if norm >= 0 else float("inf")  # -1: not finite

    def update(self) -> None:
        self.wrapped.step()
        if self.scalars:  # clamp them, and take the result into what is kept in fp32
            with self.gather(self.scalars, modifier_rank=0):
                constrain(self.module)
                values = [scalar.detach().clone() for scalar in self.scalars]
            for scalar, value in zip(self.scalars, values, strict=True):
                self._put(scalar, value)

    def skip(self) -> None:
        """DeepSpeed leaves out a step whose gradients are not finite: make them so."""
        norms = getattr(self.zero, "norm_for_param_grads", {})  # of offloaded gradients
        for name in norms:
            norms[name] = torch.full_like(norms[name], torch.nan)
        for parts in self.zero.averaged_gradients.values():
            for part in parts or ():
                part.fill_(torch.nan)
        self.wrapped.step()

    def gathered(self, tensor: Tensor) -> Tensor:
        """What is frozen is as exact as the passes have it: nothing else is kept of it."""
        if tensor.requires_grad:
            return at_rank_0(self.utils.safe_get_full_fp32_param(tensor))
        with self.gather([tensor]):
            return at_rank_0(tensor.float() if tensor.dtype in DTYPES.values() else tensor)

    def optimizer_state(self) -> dict[str, Any]:
        flat, values = self._example()
        state = {
            number: {
                key: at_rank_0(self.utils.safe_get_full_optimizer_state(parameter, key))
                if _alike(value, flat)
                else value.detach().clone()
                if isinstance(value, Tensor)
                else value
                for key, value in values.items()
            }
            for number, parameter in enumerate(self.trained if values else [])
        }
        numbers = iter(range(len(self.trained)))
        groups = [
            {**group, "params": list(itertools.islice(numbers, size))}
            for size, group in zip(self.sizes, self.optimizer.param_groups, strict=True)
        ]
        return {"state": state, "param_groups": groups} if collectives.rank() == 0 else {}

    def scaler_state(self) -> dict[str, Any] | None:
        if not self.scales_loss:
            return None
        return {k: v for k, v in vars(self.zero.loss_scaler).items() if isinstance(v, int | float)}

    def load(self, optimizer: State, scaler: State | None, weights: Weights) -> None:
        """Raises UserError for the state of an optimizer with other groups."""
        found = [len(group["params"]) for group in optimizer["param_groups"]]
        if found != self.sizes:
            raise UserError(
                f"the checkpoint's optimizer has groups of {found} parameters, this run's has "
                f"{self.sizes}: what trains has changed; set optim.groups back, or start from the "
                "weights alone, by model.init",
                key="ckpt.resume",
            )
        if self.low:  # the fp32 weights were made of rounded ones
            exact = weights()
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    self._put(parameter, exact[name])
        if optimizer["state"]:
            self._load_state(optimizer["state"])
        groups = zip(self.optimizer.param_groups, optimizer["param_groups"], strict=True)
        for group, saved in groups:
            group.update({key: value for key, value in saved.items() if key != "params"})
        if self.scales_loss and scaler is not None:
            vars(self.zero.loss_scaler).update(scaler)

    def _load_state(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        self._make_state()
        flat, example = self._example()
        for number, values in saved.items():
            for key, value in example.items():
                if _alike(value, flat):
                    self._put(self.trained[number], values[key], key)
        for state in self.optimizer.state.values():  # counts of steps are the same everywhere
            for key in (key for key, value in example.items() if not _alike(value, flat)):
                count = values[key]
                state[key] = state[key].copy_(count) if torch.is_tensor(count) else count

    def _put(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """``value``, whole, into this rank's shard of the fp32 parameter, or of its ``key``."""
        value = value.detach().float()
        if self.stage == 3:
            size = parameter.ds_tensor.numel()
            padded = F.pad(value.flatten(), (0, size * collectives.world() - value.numel()))
            value = padded[size * collectives.rank() :][:size]
        put = f"safe_set_{'local' if self.stage == 3 else 'full'}_"
        if key is None:
            getattr(self.utils, f"{put}fp32_param")(parameter, value)
        else:
            getattr(self.utils, f"{put}optimizer_state")(parameter, value, key)

    def _example(self) -> tuple[Tensor, dict[str, Any]]:
        """A flat shard and its state, whose keys and counts all shards have; {} before a step."""
        if self.stage < 3:  # by itself DeepSpeed links the first group's alone
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        pairs = (pair for pair in self.optimizer.state.items() if pair[1])
        return next(pairs, (torch.empty(0), {}))

    def _make_state(self) -> None:
        """The state as a first step makes it: with a rate of 0, on gradients of 0."""
        kind = (
            "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for number, flat in enumerate(getattr(self.zero, kind)):
            held = flat.grad
            flat.grad = torch.zeros_like(flat) if held is None else held
            self.zero._optimizer_step(number)
            flat.grad = held
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @contextmanager
    def whole(self) -> Iterator[None]:
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)  # running statistics are each rank's own
        if self.stage < 3:
            yield
            return
        hooks = self.zero.parameter_offload
        for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
            hook.remove()  # else each layer would release its weights again
        hooks.forward_hooks, hooks.backward_hooks = [], []
        with self.gather(self.module.parameters()):
            yield
        hooks._register_deepspeed_module(hooks.module)


def _alike(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
