"""Whole training, loader included: our samples per second beside open_clip's.

    python -m tests.bench train [--data FOLDER] [--threads N]

The engine's loop on configs/clip/flickr8k.yaml beside open_clip's own loop, loss, transforms, data
set and tokenizer, with the very same towers, images on the disk, batch size, number of loader
workers and number format. Runs of as many steps take turns A B B A; starting the loader's workers
counts on both sides, and writing our checkpoint does on ours.
"""

from __future__ import annotations

import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import engine.torchvision_ops  # noqa: F401
from engine.config import schema
from engine.config.schema import Config
from engine.registry import find
from engine.run import Run
from engine.train.loop import Training
from engine.types import Features
from tests.bench.peer import Trainer
from tests.bench.runs import configuration, make_run, make_training, settings
from tests.bench.table import Line, Options
from tests.bench.timing import ratio, turns

STEPS = 24  # of each run
_TOKENS = re.compile("(word|tok)_embeddings")  # BERT's and ModernBERT's table of tokens


def processor_seconds() -> float:
    """Of this process and of those children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(run: Run, folder: Path) -> Callable[[], int]:
    """A run of the engine's loop that is ready to start; it returns the samples seen."""
    training = make_training(Training, run, folder)

    def work() -> int:
        with training.log:
            training.run()
        return training.state.seen

    return work


def theirs(config: Config) -> Callable[[], int]:
    """A run of open_clip's that is ready to start."""
    return Trainer(config, config.data.train_steps or 1, config.data.batch_size).run


def assert_equal(config: Config) -> None:
    """Same towers: as many parameters but for the table of tokens; and the same loss of them."""
    trainer = Trainer(config, 1, config.data.batch_size)
    module = make_run(config).build_model()
    counts = [
        {n: p.numel() for n, p in m.named_parameters() if not _TOKENS.search(n)}
        for m in (module, trainer.model.towers)
    ]
    assert counts[0] == counts[1], "the towers differ"
    images, texts = next(iter(trainer.loader))
    with torch.no_grad():
        outputs = trainer.model(images, texts)
    features = {"image_BD": outputs["image_features"], "text_BD": outputs["text_features"]}
    shared = {"logit_scale": outputs["logit_scale"].log()}
    loss = find("losses", "nce").build(schema.Loss())(Features(features, shared))["loss"]
    torch.testing.assert_close(loss, trainer.loss(**outputs).squeeze(), rtol=1e-4, atol=1e-5)


def measure(config: Config, folder: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(samples a second of wall time, of processor time) of each run, in turns A B B A."""
    run = make_run(config)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    for number, name in turns(found, repeats):
        work = ours(run, folder / f"run{number}") if name == "ours" else theirs(config)
        start = time.perf_counter(), processor_seconds()
        samples = work()
        seconds = time.perf_counter() - start[0], processor_seconds() - start[1]
        if number >= 0:
            found[name].append((samples / seconds[0], samples / max(seconds[1], 1e-9)))
    return found


def rows(options: Options) -> Iterator[Line]:
    """Ours ÷ open_clip's samples per second, by wall time and by processor time."""
    with tempfile.TemporaryDirectory() as name:
        path, values = settings(options, Path(name))
        values |= {
            "epoch": 1,
            "data.train_steps": 2 if options.quick else STEPS,
            "dist.precision": "fp32",
        }
        if not options.quick:
            values["data.num_workers"] = None  # as many as there are cores, on both sides
        config = configuration(path, values)
        torch.set_num_threads(options.threads)
        assert_equal(config)
        found = measure(config, Path(name) / "runs", 1 if options.quick else options.repeats)
    for place, what in enumerate(("wall time", "processor time")):
        mine, peer = ([run[place] for run in found[side]] for side in ("ours", "peer"))
        yield Line(
            f"training, samples/s of {what}",
            ours=statistics.median(mine),
            peer=statistics.median(peer),
            mark="≥ 1.2",
            **ratio(mine, peer),
        )
