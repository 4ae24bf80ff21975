"""How far losses lie from DDP's where the model is sharded: python -m tests.dist.zero_table

Two gloo processes whose data differ, five rows and four, ten steps of four tasks: clip (frozen
parameters, rates of groups), t5_cross (LoRA), causal, vqa (images at one rank at a time). A cell is
the largest |loss − DDP's| ÷ DDP's of any of them; DDP's weights are fp32.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.table import markdown
from tests.dist.sharded_runs import Case, curves
from tests.distributed import run

TASKS = ("clip", "t5_cross", "causal", "vqa")
KINDS: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {  # precision, weights, tasks
    "fp32": ("fp32", None, TASKS),
    "bf16": ("bf16", None, TASKS),
    "`weights: bf16`": ("bf16", "bf16", TASKS[1:]),
    "the same, clip": ("bf16", "bf16", TASKS[:1]),
}
HEAD = ("", *KINDS)
CONFIG = ("config", "cut.json")  # ZeRO-3 leaves small parameters whole unless told not to
DISTS = {
    **{f"ZeRO-{stage}": ("deepspeed", (("zero_stage", stage), CONFIG)) for stage in range(4)},
    "FSDP2": ("fsdp2", ()),
}


def cases(name: str, kind: str) -> Iterator[Case]:
    """One of each task; none where weights are asked for that there are not."""
    dist, param = DISTS[name]
    precision, weights, tasks = KINDS[kind]
    if weights and name == "ZeRO-0":
        return
    for task in tasks:
        yield Case(
            task, dist, param + ((("weights", weights),) if weights else ()), None, precision
        )


def main() -> None:
    """Print the table."""
    every = [case for name in DISTS for kind in KINDS for case in cases(name, kind)]
    every = list(dict.fromkeys([*every, *(case.by_ddp() for case in every)]))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        (Path(folder) / "cut.json").write_text(json.dumps(settings))
        found = dict(zip(every, run(curves, 2, every, Path(folder))[0], strict=True))
    rows = [HEAD]
    for name in DISTS:
        cells = []
        for kind in KINDS:
            pairs = [(found[case][0], found[case.by_ddp()][0]) for case in cases(name, kind)]
            far = [abs(a - b) / b for ours, ddp in pairs for a, b in zip(ours, ddp, strict=True)]
            cells.append(f"{max(far):.1e}" if far else "")
        rows.append((name, *cells))
    print(markdown(rows))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
