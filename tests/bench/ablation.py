"""Which method earns what: the baseline, each method alone on top of it, and all together.

    python -m tests.bench.ablation [--study shapes flickr8k] [--data FOLDER] [--seeds 0 1 2] \
        [--methods NAME …] [--epochs N] [--keep FOLDER] [--output FILE] [section.key=value …] \
        [--tune METHOD:section.key=value …]

Every run is launch.py in a process of its own, one after another; all see equally many samples. A
run that ``--keep``'s folder already holds is not run again, so that a study may be broken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.runs import ROOT, launch, parse_overrides
from tests.bench.table import machine, markdown

LARGE, SUB = 1024, 256  # batch under accumulation, and what is in memory at once


@dataclass(frozen=True, slots=True)
class Study:
    """A YAML, what makes it the baseline, and the methods that mean something on its data."""

    path: Path
    baseline: dict[str, Any]
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """One run: means over its validation sets, in percent, and what it took."""

    recall: float  # mean R@1 of both ways
    rsum: float
    cpu_seconds: float


PLAIN = {"runner.name": "plain", "loss.name": "NCE", "data.train_type": "shuffle"}
CLIP = ROOT / "configs" / "clip"
STUDIES = {
    "shapes": Study(CLIP / "shapes_debias.yaml", PLAIN, ("debias", "mixup", "dga", "all")),
    # one source: every batch is from it anyway
    "flickr8k": Study(CLIP / "flickr8k.yaml", PLAIN, ("mixup", "dga", "all")),
}
QUICK: dict[str, Any] = {
    "data.datasets": {
        name: {"format": "shapes", "style": style, "num_train": 48, "num_valid": 16}
        for name, style in (("flat", "flat"), ("sketch", "sketch"))
    },
    "data.train_name": ["flat", "sketch"],
    "data.valid_name": ["flat", "sketch"],
    "data.batch_size": 16,
    "data.num_workers": 0,
    "epoch": 1,
}


def method(name: str, large: int, sub: int) -> dict[str, Any]:
    """What a method changes in the baseline."""
    dga = {"runner.name": "dga", "data.batch_size": large, "data.batch_size_train": sub}
    single = {
        "baseline": {},
        "debias": {"data.train_type": "debias"},
        "mixup": {"loss.name": "MixUpNCE"},
        "dga": dga,
    }
    if name == "all":
        return {key: value for part in single.values() for key, value in part.items()}
    return single[name]


def run(path: Path, values: dict[str, Any], name: str, threads: int) -> Score:
    """One training, or what an earlier one of the same settings left in its folder."""
    kept = Path(values["ckpt.dir"]) / name / "ablation.json"
    settings = {key: value for key, value in values.items() if key != "ckpt.dir"}
    if kept.is_file():
        known = json.loads(kept.read_text(encoding="utf8"))
        if known["settings"] == json.loads(json.dumps(settings)):
            return Score(**known["score"])
        raise SystemExit(f"{kept.parent} was run with other settings: remove it, or keep elsewhere")
    metrics, took = launch(path, values, name, threads)
    score = Score(_mean(metrics, "mean_R@1"), _mean(metrics, "RSUM"), took.cpu_seconds)
    figures = {field: getattr(score, field) for field in Score.__slots__}
    kept.write_text(json.dumps({"settings": settings, "score": figures}), encoding="utf8")
    return score


def _mean(metrics: dict[str, float], metric: str) -> float:
    values = [v for n, v in metrics.items() if n.count("/") == 1 and n.endswith(f"/{metric}")]
    return statistics.mean(values)


def study(name: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, ...]]:
    """The rows of one study's table, the head first; a row as soon as its runs are done."""
    seeds: Sequence[int] = options.seeds
    each = [f"seed {seed}" for seed in seeds]
    yield (f"{name}: mean R@1", *each, "mean", "− baseline", "better in", "RSUM", "CPU s a run")
    chosen, baseline = STUDIES[name], []
    for what in ("baseline", *(m for m in chosen.methods if m in options.methods)):
        values = {
            **chosen.baseline,
            "ckpt.dir": str(folder),
            "data.data_path": str(options.data or folder / "data"),
            "dist.num_threads": options.threads,
            "eval.epoch_interval": 1_000_000,  # once, at the end
            **(QUICK if options.quick else {}),
            **({"epoch": options.epochs} if options.epochs else {}),
            **method(what, options.large, options.sub),
            **options.changed,
            **options.tuned.get(what, {}),
        }
        scores = []
        for seed in seeds:
            label = f"{name}_{what}_{seed}"
            print(label, file=sys.stderr, flush=True)
            seeded = values | {"runner.seed": seed}
            scores.append(run(chosen.path, seeded, label, options.threads))
        baseline = baseline or scores
        yield row(what, scores, baseline)


def row(what: str, scores: list[Score], baseline: list[Score]) -> tuple[str, ...]:
    """A method's figures; "better in": of how many seeds, each against the baseline's same seed."""
    recalls = [score.recall for score in scores]
    gains = [s.recall - b.recall for s, b in zip(scores, baseline, strict=True)]
    compared = scores is not baseline
    return (
        what,
        *(f"{recall:.2f}" for recall in recalls),
        f"{statistics.mean(recalls):.2f}",
        f"{statistics.mean(gains):+.2f}" if compared else "",
        f"{sum(gain > 0 for gain in gains)}/{len(gains)}" if compared else "",
        f"{statistics.mean(score.rsum for score in scores):.1f}",
        f"{statistics.mean(score.cpu_seconds for score in scores):.0f}",
    )


def tables(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """One Markdown table a study."""
    for name in options.study:
        yield markdown(list(study(name, options, folder)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    methods = ("debias", "mixup", "dga", "all")
    parser.add_argument("--study", choices=tuple(STUDIES), nargs="+", default=["shapes"])
    parser.add_argument("--methods", choices=methods, nargs="+", default=list(methods))
    parser.add_argument("--data", type=Path, help="folder of flickr8k, and of drawn data (kept)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of the YAML's")
    parser.add_argument("--large", type=int, default=LARGE, help="batch under accumulation")
    parser.add_argument("--sub", type=int, default=SUB, help="its sub-batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--keep", type=Path, help="where the runs' folders stay")
    parser.add_argument("--output", type=Path, help="also write the tables there")
    parser.add_argument(
        "--tune", nargs="+", default=[], metavar="METHOD:section.key=value", help="of one method"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of all runs")
    options = parser.parse_intermixed_args(argv)
    options.data = options.data and options.data.resolve()
    options.changed = parse_overrides(options.overrides)
    options.tuned = {}
    for text in options.tune:
        name, _, override = text.partition(":")
        if name not in ("baseline", *methods):
            parser.error(
                f"--tune {text}: give METHOD:section.key=value; METHOD is one of {methods}"
            )
        options.tuned.setdefault(name, {}).update(parse_overrides([override]))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    said = [machine(options.threads)]
    print(said[0], flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        for text in tables(options, folder):
            said.append(text)
            print("\n" + text, flush=True)
    if options.output:
        options.output.write_text("\n\n".join(said) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
