"""Caption training: our real tokens per second beside transformers' Trainer.

    python -m tests.bench caption [--data FOLDER] [--threads N]

Ours is the engine's loop with its logs on tests/bench/caption.yaml, a ViT and a T5 decoder; the
peer is ``Trainer`` with ``VisionEncoderDecoderModel``, the same ViT and a GPT-2 that attends to it,
of as many parameters and FLOPs. Both train on the same samples in memory, drawn by the engine's
loader, which puts captions of like length into a batch; Trainer shuffles them, as it comes, or is
given the very same batches. Padding counts nowhere. Runs take turns A B B A.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine.torchvision_ops  # noqa: F401
from engine.config.schema import Config
from engine.losses.language_model import IGNORED
from engine.run import Run
from engine.train.loop import Training
from engine.types import Batch, Metrics
from tests.bench import caption_peer
from tests.bench.runs import (
    ROOT,
    configuration,
    high_water_kib,
    make_run,
    make_training,
    run_process,
    settings,
)
from tests.bench.table import Line, Options
from tests.bench.timing import peak_bytes, ratio, turns

CONFIG = ROOT / "tests" / "bench" / "caption.yaml"
STEPS = 12  # of each run
SPAN = 48  # batches in succession that they are taken from, of all lengths alike
Work = Callable[[], float]  # processor seconds from the first step's begin to the last one's end


class Replay(Training):
    """The loop over batches that are there; no checkpoint."""

    given: list[Batch]
    started: float

    def _batches(self) -> Iterator[tuple[int, Batch, list[Any]]]:
        self.started = time.process_time()
        for step, batch in enumerate(self.given):
            yield step, dict(batch), []

    def save(self, metrics: Metrics) -> None:
        """Nothing: both sides are timed without."""


def replay(run: Run, batches: list[Batch], folder: Path) -> Work:
    """A training over the batches, ready to begin."""
    training = make_training(Replay, run, folder)
    training.given = batches

    def work() -> float:
        with training.log:
            training.run()
            return time.process_time() - training.started

    return work


def num_tokens(batch: Batch) -> int:
    """Supervised ones: padding is none."""
    return int((batch["labels_BT"] != IGNORED).sum())


class Case:
    """A configuration, batches of its data by the engine's loader, and runs over them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.run = make_run(config, "caption")
        drawing = make_training(Training, self.run, folder / "draw")
        steps = config.data.train_steps or 1
        with drawing.log:
            drawn = [b for _, b, _ in itertools.islice(drawing._batches(), steps * SPAN // STEPS)]
        drawn.sort(key=num_tokens)
        self.batches = drawn[len(drawn) // steps // 2 :: len(drawn) // steps]
        self.rows = caption_peer.items(self.batches)
        self.tokens = sum(map(num_tokens, self.batches))
        self.image_size = self.batches[0]["image_BCHW"].shape[-1]
        self.columns = config.model.decoder.max_length

    def ours(self) -> Work:
        return replay(self.run, self.batches, self.folder / "ours")

    def peer_model(self) -> Any:
        vocabulary = self.run.tokenizer.vocab_size
        return caption_peer.make_model(self.config, vocabulary, self.image_size)

    def peer(self, *, shuffled: bool = True, length: int | None = None) -> Work:
        trainer, clock = caption_peer.make_trainer(
            self.peer_model(), self.rows, self.config, self.folder, shuffled=shuffled, length=length
        )

        def work() -> float:
            trainer.train()
            return time.process_time() - clock.started

        return work


def assert_same_size(case: Case) -> None:
    """As many parameters, to 2 %; as many FLOPs, to 5 %, for a batch that needs no padding."""
    mine, theirs = case.run.build_model(), case.peer_model()
    counts = [sum(p.numel() for p in model.parameters()) for model in (mine, theirs)]
    assert 0.98 < counts[0] / counts[1] < 1.02, counts
    batch = dict(case.batches[0])
    rows, length = batch["input_ids_BT"].shape
    batch["labels_BT"] = torch.full((rows, length), 5)
    batch["input_ids_BT"] = torch.full((rows, length), 5)
    batch["attention_mask_BT"] = torch.ones(rows, length, dtype=torch.long)
    collated = caption_peer.Collate(case.config)(caption_peer.items([batch]))
    losses: list[Callable[[], Any]] = [
        lambda: mine(batch)["nll_B"].sum().backward(),
        lambda: theirs(**collated).loss.backward(),
    ]
    flop = []
    for work in losses:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            work()
        flop.append(counter.get_total_flops())
    assert 0.95 < flop[0] / flop[1] < 1.05, flop


def speed(case: Case, repeats: int) -> Iterator[Line]:
    """Our real tokens per second of processor time ÷ the peer's, however it pads."""
    peers = {
        "shuffled, padded to the longest": ("≥ 1.5", case.peer),
        f"shuffled, padded to {case.columns}": ("", lambda: case.peer(length=case.columns)),
        "given our batches, padded to the longest": ("", lambda: case.peer(shuffled=False)),
    }
    makers = {"ours": case.ours} | {name: make for name, (_, make) in peers.items()}
    found: dict[str, list[float]] = {name: [] for name in makers}
    for number, name in turns(makers, repeats):
        seconds = makers[name]()()  # made before its own clock starts
        if number >= 0:
            found[name].append(seconds)
    for name, (mark, _) in peers.items():
        mine, theirs = (
            case.tokens / max(statistics.median(found[x]), 1e-9) for x in ("ours", name)
        )
        yield Line(f"÷ Trainer, {name}", mine, theirs, mark=mark, unit="tokens/s",
                   **ratio(found[name], found["ours"]))  # fmt: skip


def configured(options: Options, folder: Path) -> tuple[dict[str, Any], Config]:
    """What is changed in the YAML, and all of it."""
    _, values = settings(Options(False, options.threads, data=options.data), folder)
    values |= {"data.train_steps": 2 if options.quick else STEPS, "epoch": 8}
    if options.data is None:
        shapes = {"format": "shapes", "image_size": 64, "num_valid": 8, "num_train": 6400}
        values["data.datasets"] = {"drawn": shapes}
    if options.quick:
        values |= {"data.batch_size": 8, "model.decoder.config.num_decoder_layers": 1}
        values |= {"model.image_encoder.param.num_hidden_layers": 1}
        if options.data is None:
            shapes["num_train"] = 64
    return values, configuration(CONFIG, values)


def processes(options: Options, folder: Path) -> Iterator[Line]:
    """Peak memory of a process of each side's own, and by how much training raised it."""
    found = {}
    for side in ("ours", "peer"):
        output = folder / f"{side}.json"
        command = [sys.executable, "-m", "tests.bench.caption", side, f"--output={output}"]
        command += [f"--threads={options.threads}"]
        command += [] if options.data is None else [f"--data={options.data}"]
        run_process(command, folder / f"{side}.txt", options.threads)
        found[side] = json.loads(output.read_text(encoding="utf8"))
    for key, what, mark in (
        ("peak", "largest process", "≤ 1"),
        ("rise", "of that in training", ""),
    ):
        mine, theirs = (found[side][key] for side in ("ours", "peer"))
        yield Line(f"{what} ÷ Trainer's", mine, theirs, ratio=mine / theirs, mark=mark,
                   unit="MiB")  # fmt: skip


def rows(options: Options) -> Iterator[Line]:
    """Speed, and peak memory: of tensors, and of whole processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, config = configured(options, folder)
        case = Case(config, folder)
        assert_same_size(case)
        yield from speed(case, 1 if options.quick else options.repeats)
        mib = [peak_bytes(make()) / 2**20 for make in (case.ours, case.peer)]
        yield Line("peak memory of tensors ÷ Trainer's", *mib, ratio=mib[0] / mib[1],
                   mark="≤ 1", unit="MiB")  # fmt: skip
        if not options.quick:
            yield from processes(options, folder)


def main() -> None:
    """One side's training as a process of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("side", choices=("ours", "peer"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        _, config = configured(Options(False, given.threads, data=given.data), Path(name))
        case = Case(config, Path(name))
        work = case.ours() if given.side == "ours" else case.peer()
        before = high_water_kib()
        work()
        peak = high_water_kib()
        told = {"peak": peak / 2**10, "rise": (peak - before) / 2**10}
        given.output.write_text(json.dumps(told), encoding="utf8")


if __name__ == "__main__":
    main()
