"""ZeRO by DeepSpeed: optimizer state, gradients and weights in shares, one a rank.

Rajbhandari et al. 2020, arXiv:1910.02054. Stage 1 shares out the optimizer's state, 2 the gradients
too, 3 the weights as well; stage 0 shares out nothing and is torch's DDP. The optimizer, its
groups, the schedule and the checkpoints are the engine's own at every stage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from engine import registry
from engine.config.schema import Config, Dist
from engine.dist import collectives
from engine.dist.launch import join_alone
from engine.dist.sharded import Sharded, refuse_batch_norm
from engine.dist.zero_settings import KEY, Settings, prepare_process, width
from engine.dist.zero_shares import Shares
from engine.errors import UserError

_RELEASE = "0.19."  # inner parts of it are called
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(config: Config, device: torch.device, precision: str) -> None:
    """Raises UserError for whatever cannot work, before any data is read."""
    if find_spec("deepspeed") is None:
        raise UserError(
            "dist.name deepspeed needs DeepSpeed, which is not installed: "
            "pip install -e '.[deepspeed]', or take dist.name: torch",
            key="dist.name",
        )
    settings = Settings(config, collectives.world(), precision)
    if settings.offloads and device.type == "cpu":
        raise UserError(
            "offload moves memory from GPUs to the host, and this run is on the CPU: leave it out",
            key="dist.param.offload",
        )
    if not (found := version("deepspeed")).startswith(_RELEASE):
        raise UserError(f"DeepSpeed {found} is installed, and this is written for {_RELEASE}x: "
                        "pip install -e '.[deepspeed]'", key="dist.name")  # fmt: skip
    prepare_process(device)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if settings.weights == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(f"DeepSpeed has no fp16 on {device.type}; take bf16 or fp32",
                        key="dist.precision")  # fmt: skip
    try:
        DeepSpeedZeroConfig(**settings.resolved(1, 1)["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{settings.param.config}: zero_optimization.{place}: {first['msg']}", key=KEY
        ) from error


def device_bytes(
    config: Config, precision: str, world: int, whole: Mapping[str, int]
) -> dict[str, int]:
    """What one device holds of weights, gradients and optimizer; ``whole`` is by DDP in fp32."""
    return Settings(config, world, precision).device_bytes(whole)


def build(
    model: nn.Module,
    config: Dist,
    device: torch.device,
    *,
    optimizer: torch.optim.Optimizer,
    run: Config,
    precision: str,
) -> nn.Module:
    """``model`` and its ``optimizer``, shared out; ``dist.param`` is that of ``Param``.

    ``model`` may lie on the CPU: at stage 3 it reaches the device share by share.
    """
    settings = Settings(run, collectives.world(), precision)
    if settings.stage == 0:
        return registry.find("dist", "torch").build(model, Dist(), device)
    refuse_batch_norm(model, settings.weights)
    return ZeRO(model, optimizer, settings, device)


class _Cast(nn.Module):
    """The model under autocast, which DeepSpeed leaves before it calls what it is given."""

    def __init__(self, module: nn.Module, kind: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module, self.kind, self.dtype = module, kind, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype is not None):
            return self.module(*args, **kwargs)


class ZeRO(Sharded):
    """A model and its optimizer in DeepSpeed's hands, stages 1 to 3."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        device: torch.device,
    ) -> None:
        super().__init__()
        prepare_process(device)
        join_alone(device)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # An extension for inference, which it would compile for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage, self.low = settings.stage, settings.weights != "fp32"
        self.lockstep = settings.stage == 3
        self.scales_loss = settings.weights == "fp16"
        groups = [list(group["params"]) for group in optimizer.param_groups]
        trained = [parameter for group in groups for parameter in group]
        self.scalars = [parameter for parameter in trained if parameter.numel() == 1]
        numbers, hidden = sum(parameter.numel() for parameter in trained), width(module)
        deepspeed.init_distributed(
            dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        if self.stage == 3:  # tensor by tensor: all of them might not fit
            low = _DTYPES.get(settings.weights, torch.float32)
            for parameter in module.parameters():
                parameter.data = parameter.data.to(low)
            deepspeed.zero.Init(module, config_dict_or_path=settings.resolved(numbers, hidden))
            module.to(device)  # buffers
        self.engine = deepspeed.initialize(
            model=_Cast(module, device.type, _DTYPES.get(settings.precision)),
            optimizer=optimizer,
            config=settings.resolved(numbers, hidden),
            dist_init_required=False,
        )[0]
        self.optimizer = self.engine.basic_optimizer
        self.shares = Shares(self.engine.optimizer, self.optimizer, groups, deepspeed)

    @property
    def module(self) -> nn.Module:
        """The model as it was built."""
        return self.engine.module.module

    @property
    def zero(self) -> Any:
        """DeepSpeed's own optimizer, which holds the shares."""
        return self.engine.optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.zero.zero_grad(set_to_none)

    def hold(self) -> AbstractContextManager[None]:
        """Gradients are whole on every rank meanwhile, also where ZeRO would share them out."""
        return self.engine.coalesce_grad_reduction()

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None) -> None:
        loss = outputs[0]
        if gradients is not None:  # DeepSpeed takes a scalar; the gradient of Σ⟨z, g⟩ at z is g
            pairs = zip(outputs, gradients, strict=True)
            loss = torch.stack([(z * g).sum() for z, g in pairs]).sum()
        self.engine.backward(loss)

    def clip(self, max_norm: float | None) -> float:
        """The norm; ``update`` clips by the bound that DeepSpeed was set up with."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self.stage == 3:
            norm = float(combine_grad_norm_groups(self.zero._get_norm_groups()))
        else:
            norm = float(self.zero.scaled_global_norm())
        return norm / self.zero.loss_scale if norm >= 0 else float("inf")  # -1: not finite

    def update(self) -> None:
        self.engine.step()
        self._constrain()

    def skip(self) -> None:
        """DeepSpeed leaves out a step whose gradients are not finite: make them so."""
        norms = getattr(self.zero, "norm_for_param_grads", {})  # of offloaded gradients
        for name in norms:
            norms[name] = torch.full_like(norms[name], torch.nan)
        for parts in self.zero.averaged_gradients.values():
            for part in parts or ():
                part.fill_(torch.nan)
        self.engine.step()

    def weights(self) -> dict[str, Tensor]:
        return self.shares.weights(self.module)

    def optimizer_state(self) -> dict[str, Any]:
        return self.shares.state_dict()

    def scaler_state(self) -> dict[str, Any] | None:
        if not self.scales_loss:
            return None
        return {k: v for k, v in vars(self.zero.loss_scaler).items() if isinstance(v, int | float)}

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        scaler: Mapping[str, Any] | None,
    ) -> None:
        if self.low:  # what is kept in fp32 was made of rounded ones
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    self.shares.put(parameter, weights[name])
        self.shares.load_state_dict(optimizer)
        if self.scales_loss and scaler is not None:
            vars(self.zero.loss_scaler).update(scaler)

    def _constrain(self) -> None:
        """Let the model clamp its scalars, and take the result into what is kept in fp32."""
        clamp = getattr(self.module, "constrain", None)
        if callable(clamp) and self.scalars:
            with self.shares.gathered(self.scalars, modifier_rank=0):
                clamp()
                values = [scalar.detach().clone() for scalar in self.scalars]
            for scalar, value in zip(self.scalars, values, strict=True):
                self.shares.put(scalar, value)

    @contextmanager
    def whole(self) -> Iterator[None]:
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)  # running statistics are each rank's own
        if self.stage < 3:
            yield
            return
        hooks = self.zero.parameter_offload
        for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
            hook.remove()  # else each layer would give its weights back
        hooks.forward_hooks, hooks.backward_hooks = [], []
        with self.shares.gathered(self.module.parameters()):
            yield
        hooks._register_deepspeed_module(hooks.module)
