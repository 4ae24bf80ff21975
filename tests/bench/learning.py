"""What is learned from equal compute: retrieval after our training and after open_clip's.

    python -m tests.bench.learning --data FOLDER [--tflop 26] [--towers same own] [--threads N] \
        [section.key=value …]

Both start from random weights and run as processes of their own: ours is launch.py with
configs/clip/flickr8k.yaml (and what is changed on the command line), the peer is open_clip's
training at batch 256, lr 1e-3 and its other defaults. FLOPs are counted over whole steps by torch's
counter, with attention as plain products, since it does not know the CPU's fused one. First both
get the same number of FLOPs; then ours gets as many steps as the peer's processor time is worth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine.torchvision_ops  # noqa: F401
from engine.config.schema import Config
from engine.train.loop import Training
from tests.bench.peer import Trainer
from tests.bench.runs import (
    Finished,
    as_overrides,
    configuration,
    launch,
    make_run,
    make_training,
    parse_overrides,
    run_process,
    settings,
)
from tests.bench.table import Line, Options, machine, table

TFLOP, BATCHES = 26.0, 3  # of the budget; batches over which FLOPs are counted
PEER_BATCH = 256


def ours_flop(config: Config) -> tuple[float, int]:
    """FLOPs of one of our steps (mean of a few: captions differ in length), steps of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        training = make_training(Training, make_run(config), Path(folder))
        gradients, found = training._build_step(), []
        with training.log:
            for step, batch, _ in itertools.islice(training._batches(), BATCHES):
                batch["step"] = step
                counter = FlopCounterMode(display=False)
                with counter, sdpa_kernel(SDPBackend.MATH):
                    gradients(batch, step)
                training.state.module.zero_grad()
                found.append(counter.get_total_flops())
        return sum(found) / len(found), training.plan.steps_per_epoch


def peer_flop(config: Config, towers: str, batch_size: int) -> float:
    """FLOPs of one of open_clip's steps; all its captions have 77 tokens."""
    trainer = Trainer(config, 1, batch_size, towers)
    images, texts = next(iter(trainer.loader))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        trainer.loss(**trainer.model(images, texts)).backward()
    return counter.get_total_flops()


def train_ours(path: Path, values: dict[str, Any], steps: int, per_epoch: int, name: str,
               threads: int) -> tuple[float, Finished, int]:  # fmt: skip
    """(RSUM, what it took, steps) of a run of about so many steps in equal epochs."""
    epochs = max(1, math.ceil(steps / per_epoch))
    length = max(1, round(steps / epochs))
    values = values | {"epoch": epochs, "data.train_steps": length}
    metrics, finished = launch(path, values, name, threads)
    return rsum(metrics), finished, epochs * length


def train_peer(path: Path, values: dict[str, Any], steps: int, towers: str, batch_size: int,
               folder: Path, threads: int) -> tuple[float, Finished]:  # fmt: skip
    """(RSUM, what it took) of open_clip's training."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{towers}.json"
    command = [
        sys.executable, "-m", "tests.bench.peer_run", f"--cfg={path}", f"--steps={steps}",
        f"--batch-size={batch_size}", f"--towers={towers}", f"--output={output}",
    ]  # fmt: skip
    finished = run_process([*command, *as_overrides(values)], folder / f"{towers}.txt", threads)
    return rsum(json.loads(output.read_text(encoding="utf8"))), finished


def rsum(metrics: dict[str, float]) -> float:
    """Mean over the validation sets; scores of shuffled captions are left out."""
    names = [name for name in metrics if name.count("/") == 1 and name.endswith("/RSUM")]
    return sum(metrics[name] for name in names) / len(names)


def compare(
    options: Options, folder: Path, towers: str, tflop: float, changed: dict[str, Any]
) -> Iterator[Line]:
    """Ours beside one peer, at equal FLOPs and at equal processor time."""
    path, values = settings(options, folder)
    own = values | changed
    torch.set_num_threads(options.threads)
    batch_size = 16 if options.quick else PEER_BATCH
    theirs = peer_flop(configuration(path, values), towers, batch_size)
    each, per_epoch = ours_flop(configuration(path, own | {"data.num_workers": 0}))
    budget = 2 * theirs if options.quick else 1e12 * tflop
    steps, peer_steps = (max(1, round(budget / flop)) for flop in (each, theirs))

    peer, peer_took = train_peer(
        path, values, peer_steps, towers, batch_size, folder / "peer", options.threads
    )
    mine, took, done = train_ours(path, own, steps, per_epoch, f"flops_{towers}", options.threads)
    yield Line(f"RSUM at equal FLOPs, {towers} towers", mine, peer, ratio=mine / max(peer, 1e-9),
               mark="≥ 1.15")  # fmt: skip
    yield Line("compute", done * each / 1e12, peer_steps * theirs / 1e12, unit="TFLOP")
    yield Line("processor time", took.cpu_seconds, peer_took.cpu_seconds, unit="s")
    yield Line("largest process", took.peak_mib, peer_took.peak_mib, unit="MiB")

    share = peer_took.cpu_seconds / max(took.cpu_seconds, 1e-9)
    if abs(share - 1) > 0.05:
        steps = max(1, round(done * (0.5 if options.quick else share)))
        mine, took, _ = train_ours(path, own, steps, per_epoch, f"time_{towers}", options.threads)
    yield Line(f"RSUM at equal processor time, {towers} towers", mine, peer,
               ratio=mine / max(peer, 1e-9), mark="≥ 1.15")  # fmt: skip
    yield Line("processor time", took.cpu_seconds, peer_took.cpu_seconds, unit="s")


def rows(
    options: Options,
    tflop: float = TFLOP,
    towers: Sequence[str] = ("same",),
    changed: dict[str, Any] | None = None,
) -> Iterator[Line]:
    """Each peer's lines in turn; run folders are dropped."""
    for kind in towers:
        with tempfile.TemporaryDirectory() as folder:
            yield from compare(options, Path(folder), kind, tflop, changed or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the datasets that the YAML names")
    parser.add_argument("--tflop", type=float, default=TFLOP, help="budget (default %(default)s)")
    parser.add_argument("--towers", choices=("same", "own"), nargs="+", default=["same"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of ours alone")
    given = parser.parse_intermixed_args()
    options = Options(given.quick, given.threads, data=given.data and given.data.resolve())
    changed = parse_overrides(given.overrides)
    print(machine(given.threads), flush=True)
    print(table(rows(options, given.tflop, given.towers, changed)))


if __name__ == "__main__":
    main()
