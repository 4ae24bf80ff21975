"""The benchmarks: python -m tests.bench [ROW …] [--data FOLDER] [--threads N] [--quick].

Rows: loss, dga, truth, step, text, train, loading, tar, caption, head, generate, accumulate,
grouped, vqa_score, recognize, onnx; learning and ablation take hours and run only by name.
``--quick`` runs tiny sizes: it shows that a row runs and that its two sides agree, and no more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tests.bench.table import HEAD, Line, Options, machine, table

Rows = Callable[[Options], Iterator[Line]]


def loss(options: Options) -> Iterator[Line]:
    """The losses beside open_clip's."""
    from tests.bench import loss as bench

    batches = (64, 128) if options.quick else (2048, 4096, 8192)
    marks = {"NCE": ("≥ 15", 4.0), "Sigmoid": ("≥ 8", 3.0)}
    for name, (memory, limit) in marks.items():
        before: dict[str, float] = {}
        for batch in batches:
            found = bench.compare(name, batch, 1 if options.quick else options.repeats)
            big, largest = batch >= 4096, batch == 8192
            seconds = found["ours_s"]
            yield Line(f"{name} {batch}, time", 1e3 * seconds, 1e3 * seconds / found["time_ratio"],
                       ratio=found["time_ratio"], spread=found["ours_spread"],
                       mark="≤ 0.70" if big else "", unit="ms")  # fmt: skip
            yield Line(f"{name} {batch}, matrix products", found["ours_mm"], found["peer_mm"],
                       limit=limit, ratio=found["ours_mm"],
                       mark="≤ 4.3" if big and name == "NCE" else "")  # fmt: skip
            yield Line(f"{name} {batch}, peer's memory ÷ ours", found["ours_mib"],
                       found["peer_mib"], ratio=found["memory_ratio"],
                       mark=memory if largest else "", unit="MiB")  # fmt: skip
            if before:
                slope = math.log(found["ours_mib"] / before["ours_mib"])
                slope /= math.log(batch / before["batch"])
                yield Line(f"{name} {batch}, log-slope of memory", slope, ratio=slope,
                           mark="≤ 1.2" if largest else "")  # fmt: skip
            before = found


def dga(options: Options) -> Iterator[Line]:
    """The accumulation step beside its limit, GradCache's and open_clip's, by processor time."""
    from tests.bench import dga as bench

    for k in (2,) if options.quick else (4, 8, 16):
        rows, size, repeats = (4, 16, 1) if options.quick else (64, 64, options.repeats)
        found = bench.compare(k, rows, size, repeats)
        milliseconds = {name: 1e3 * value for name, value in found["seconds"].items()}
        spread = found["spread"]["ours keep 1"]
        ours, limit = milliseconds["ours keep 1"], milliseconds["limit keep 1"]
        yield Line(f"k {k}, keep 1, ÷ limit", ours, limit=limit, ratio=ours / max(limit, 1e-9),
                   spread=spread, mark="≤ 1.03", unit="ms")  # fmt: skip
        for kept, marks in (("keep 1", ("", "")), ("auto", ("≤ 0.85", "≤ 0.95"))):
            ours = milliseconds[f"ours {kept}"]
            for peer, mark in zip(("gradcache", "open_clip"), marks, strict=True):
                yield Line(f"k {k}, {kept}, ÷ {peer}", ours, milliseconds[peer],
                           ratio=ours / max(milliseconds[peer], 1e-9),
                           spread=found["spread"][f"ours {kept}"], mark=mark,
                           unit="ms")  # fmt: skip
        ours, limit = milliseconds["ours keep all"], milliseconds["limit keep all"]
        yield Line(f"k {k}, all graphs kept, ÷ undivided", ours, limit=limit,
                   ratio=ours / max(limit, 1e-9), spread=found["spread"]["ours keep all"],
                   mark="≤ 1.03", unit="ms")  # fmt: skip
        # At a size where activations, not the weights' gradients, are what a sub-batch costs.
        mib = bench.memory(k, *((2, 16) if options.quick else (16, 224)))
        yield Line(f"k {k}, keep 1, memory ÷ a sub-batch of 16's step and features",
                   mib["ours keep 1"], mib["gradcache"], mib["plain"],
                   mib["ours keep 1"] / mib["plain"], "≤ 1.15", unit="MiB")  # fmt: skip


def truth(options: Options) -> Iterator[Line]:
    """Gradients ÷ truth (the component along it), fp64; ``ratio`` is our relative error."""
    from tests.bench import dga_truth as bench

    torch.set_num_threads(1)  # ranks are forked, which OpenMP's threads would not survive
    worlds, parts = ((1,), (2,)) if options.quick else ((1, 2, 4), (1, 2, 4, 8))
    for name in ("NCE", "Sigmoid"):
        for world in worlds:
            for k in parts:
                found = {step: bench.compare(step, name, world, k) for step in bench.STEPS}
                for group, (along, error) in found["ours"].items():
                    assert error <= 1e-10, (name, world, k, group, error)
                    for peer in ("gradcache", "open_clip"):
                        yield Line(f"{name}, {world} ranks, k {k}, {group}; {peer}", along,
                                   found[peer][group][0], limit=1.0, ratio=error,
                                   mark="≤ 1e-10")  # fmt: skip
    torch.set_num_threads(options.threads)


def _module(name: str) -> Rows:
    def rows(options: Options) -> Iterator[Line]:
        import importlib

        yield from importlib.import_module(f"tests.bench.{name}").rows(options)

    return rows


def ablation(options: Options) -> str:
    """The study's own tables."""
    from tests.bench import ablation as bench

    argv = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    argv += ["--study", "shapes"]
    if options.data is not None:
        argv += ["flickr8k", "--data", str(options.data)]
    if options.quick:
        argv += ["--seeds", "0", "--methods", "all", "--large", "32", "--sub", "16"]
    bench.main(argv)
    return ""


ROWS: dict[str, Rows] = {
    "loss": loss,
    "dga": dga,
    "truth": truth,
    "step": _module("step"),
    "text": _module("text"),
    "train": _module("train"),
    "loading": _module("loading"),
    "tar": _module("tar"),
    "caption": _module("caption"),
    "head": _module("head"),
    "generate": _module("generation"),
    "accumulate": _module("accumulate"),
    "grouped": _module("grouped"),
    "vqa_score": _module("vqa_score"),
    "recognize": _module("recognize"),
    "onnx": _module("onnx"),
    "learning": _module("learning"),
}
LONG = ("learning", "ablation")


def run(name: str, options: Options) -> str:
    """A row's table."""
    torch.set_num_threads(options.threads)
    if name == "ablation":
        return ablation(options)
    return table(ROWS[name](options), HEAD)


def main(argv: Sequence[str] | None = None) -> None:
    names = [*ROWS, "ablation"]
    default = [name for name in names if name not in LONG]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, help="folder of flickr8k; else shapes are drawn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.row) - set(names)):
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(names)}")
    data = given.data.resolve() if given.data else None
    options = Options(given.quick, given.threads, given.repeats, data)
    print(machine(options.threads), flush=True)
    if options.quick:
        print("tiny sizes: the two sides agree, and no time or ratio below says anything")
    for name in given.row or default:
        print(f"\n{name}", flush=True)
        print(run(name, options), flush=True)


if __name__ == "__main__":
    main()
