"""Learning-rate schedules: the factor on ``optim.lr.init`` as a pure function of the step.

Each function below is a name that ``optim.lr.name`` may take, its keyword arguments are what
``optim.lr.param`` may hold, and what it returns holds after the warm-up, which climbs linearly
from 0 at step 0.
"""

from __future__ import annotations

import bisect
import inspect
import math
from collections.abc import Callable, Iterable, Sequence

from engine.config.schema import Lr
from engine.errors import UserError
from engine.registry import nearest

Factor = Callable[[int], float]


def constant_schedule(warmup_steps: int, total_steps: int) -> Factor:
    """1 at every step; the one schedule without a warm-up."""
    return lambda step: 1.0


def constant_schedule_with_warmup(warmup_steps: int, total_steps: int) -> Factor:
    """1 after warm-up."""
    return lambda step: 1.0


def linear_schedule_with_warmup(warmup_steps: int, total_steps: int) -> Factor:
    """Down to 0 at ``total_steps``."""
    length = max(1, total_steps - warmup_steps)
    return lambda step: max(0.0, (total_steps - step) / length)


def multi_step_schedule_with_warmup(
    warmup_steps: int, total_steps: int, *, milestone_steps: Sequence[float], gamma: float = 0.1
) -> Factor:
    """Times ``gamma`` from each milestone on: a step, or below 1 a fraction of all steps."""
    steps = sorted(m * total_steps if 0 < m < 1 else m for m in milestone_steps)
    return lambda step: gamma ** bisect.bisect_right(steps, step)


def cosine_schedule_with_warmup(
    warmup_steps: int, total_steps: int, *, num_cycles: float = 0.5
) -> Factor:
    """Along a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), half a wave down to 0."""
    return cosine_schedule_with_warmup_min_lr_scale(
        warmup_steps, total_steps, num_cycles=num_cycles, min_lr_scale=0.0
    )


def cosine_schedule_with_warmup_min_lr_scale(
    warmup_steps: int, total_steps: int, *, num_cycles: float = 0.5, min_lr_scale: float = 0.01
) -> Factor:
    """Along a cosine down to ``min_lr_scale``, a number from 0 to 1."""
    if not 0.0 <= min_lr_scale <= 1.0:
        raise ValueError(f"min_lr_scale is {min_lr_scale}, it must be from 0 to 1")
    length = max(1, total_steps - warmup_steps)

    def wave(step: int) -> float:
        height = 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * (step - warmup_steps) / length))
        return min_lr_scale + (1.0 - min_lr_scale) * height

    return wave


SCHEDULES: dict[str, Callable[..., Factor]] = {
    function.__name__: function
    for function in (
        constant_schedule,
        constant_schedule_with_warmup,
        linear_schedule_with_warmup,
        multi_step_schedule_with_warmup,
        cosine_schedule_with_warmup,
        cosine_schedule_with_warmup_min_lr_scale,
    )
}


def factor(config: Lr, total_steps: int) -> Factor:
    """The schedule of a run of ``total_steps``: step from 0 → factor on the learning rate.

    Raises UserError for an unknown name or param, or a value that is out of range.
    """
    if config.name not in SCHEDULES:
        hint = nearest(config.name, list(SCHEDULES))
        raise UserError(f"no schedule is called {config.name!r}; {hint}", key="optim.lr.name")
    schedule = SCHEDULES[config.name]
    known = list(inspect.signature(schedule).parameters)[2:]
    refuse_unknown(config.name, config.param, known, "optim.lr.param")
    warmup = warmup_steps(config, total_steps)
    try:
        after = schedule(warmup, total_steps, **config.param)
        after(0)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config.name}: {error}", key="optim.lr.param") from error
    if schedule is constant_schedule:
        return after
    return lambda step: step / warmup if step < warmup else after(step)


def refuse_unknown(owner: str, param: Iterable[str], known: list[str], key: str) -> None:
    """Raises UserError below ``key`` for a name in ``param`` that ``owner`` does not take."""
    for name in param:
        if name not in known:
            hint = nearest(name, known) if known else "it takes none"
            raise UserError(f"{owner} has no param {name!r}; {hint}", key=f"{key}.{name}")


def warmup_steps(config: Lr, total_steps: int) -> int:
    """Steps of warm-up: ``warmup_steps`` where given, else the proportion of all steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return int(total_steps * config.warmup_proportion)
