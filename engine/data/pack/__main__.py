"""Datasets of any format → tar shards or the CSV folder form; see data/README.md.

    python -m engine.data.pack SOURCE DEST --to webdataset|csv [options]

Images are copied byte for byte. Every shard is read back and compared by check sum, and at the end
DEST is read as a run would read it and compared with SOURCE, sample by sample. Exit codes: 0 done,
1 a fault, 2 a mistake to mend, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path

from rich.console import Console
from rich.text import Text

from engine.data.bad_samples import summary
from engine.data.pack import origin as pack_origin
from engine.data.pack.check import read_back
from engine.data.pack.digest import Digest
from engine.data.pack.plan import CAPTIONS, FORMS, Plan, held, make_plan, origin, write_whole
from engine.data.pack.shards import Shard, pack_shard
from engine.data.pack.text import COLUMNS
from engine.data.pack.writers import join_parts
from engine.errors import UserError, exit_code
from engine.tools import jobs

SHARD_SIZE = 10_000  # images; img2dataset's default
BAD_FILE = "bad_samples.jsonl"


def main(argv: Sequence[str]) -> int:
    """Pack; returns the exit code. Raises UserError and FaultError."""
    arguments = _parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    for split in arguments.splits:
        with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
            _pack_split(arguments, split, Path(scratch), console)
    return 0


def _pack_split(arguments: argparse.Namespace, split: str, scratch: Path, console: Console) -> None:
    source, options = pack_origin.open_origin(arguments, split)
    plan = make_plan(
        source,
        scratch,
        captions=arguments.captions,
        to=arguments.to,
        dest=arguments.dest,
        split=split,
        shard_size=arguments.shard_size,
    )
    with held(plan, origin(plan, options, arguments.captions)):
        try:
            shards = _pack(plan, arguments.jobs, console)
            _finish(plan, shards, arguments.jobs, console)
        except KeyboardInterrupt:
            kept = sum(plan.stats(number).exists() for number in plan.shards)
            _say(
                f"stopped: {kept} of {len(plan.shards)} shards of {split} are finished and kept in "
                f"{plan.dest}; the same command goes on from there",
                Console(stderr=True, highlight=False, soft_wrap=True),
            )
            raise


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = jobs.Parser(
        prog="python -m engine.data.pack",
        description="Pack a dataset of any format into tar shards or the CSV folder form.",
        epilog="Exit codes: 0 done, 1 a fault, 2 a mistake to mend, 130 stopped by Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder; with --cfg a dataset's name")
    parser.add_argument("dest", metavar="DEST", type=Path, help="a new folder, or one begun before")
    parser.add_argument("--to", required=True, choices=FORMS)
    parser.add_argument("--split", choices=("train", "valid"), help="default: train")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--cfg", type=Path, metavar="FILE", help="YAML with data.datasets.SOURCE")
    given.add_argument("--format", metavar="F", help="of SOURCE; default: what the folder shows")
    parser.add_argument(
        "--option", action="append", default=[], metavar="K=V", help="of the format; repeatable"
    )
    parser.add_argument(
        "--captions",
        choices=CAPTIONS,
        default="all",
        help="of an image with several: all (default), joined into one text, or the first",
    )
    parser.add_argument(
        "--valid-share",
        type=float,
        metavar="S",
        help="of a folder of images with texts beside them: the share that becomes the valid split",
    )
    parser.add_argument("--shard-size", type=jobs.count, default=SHARD_SIZE, metavar="IMAGES")
    parser.add_argument("--jobs", type=jobs.count, default=jobs.default_jobs(), metavar="N")
    arguments = parser.parse_args(argv)
    both = arguments.split is None and bool(arguments.valid_share)
    arguments.splits = ("train", "valid") if both else (arguments.split or "train",)
    return arguments


def _pack(plan: Plan, num_jobs: int, console: Console) -> list[Shard]:
    shards = []
    with jobs.progress_bar(f"packing {plan.split}", plan.num_rows, console) as tick:
        for shard in jobs.each(pack_shard, plan, plan.shards, jobs=num_jobs, tick=tick):
            if shard.how == "mended":
                _say(f"{plan.content(shard.number)} was damaged and has been packed anew", console)
            shards.append(shard)
    return sorted(shards, key=lambda shard: shard.number)


def _finish(plan: Plan, shards: list[Shard], num_jobs: int, console: Console) -> None:
    """Name the bad samples, put a CSV together, compare, and tell the counts."""
    bad = [record for shard in shards for record in shard.bad]
    samples = sum(shard.samples for shard in shards)
    if not samples:
        raise UserError(
            f"no sample of {plan.source.name!r} {plan.split} can be used: {summary(bad)}"
        )
    if plan.to == "csv":
        used = {column for shard in shards for column in shard.columns}
        join_parts(plan, [column for column in COLUMNS if column in used])
    listed = plan.folder / BAD_FILE
    if bad:
        lines = (json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in bad)
        write_whole(listed, "".join(lines))
    packed = reduce(add, (shard.digest for shard in shards), Digest())
    read = read_back(plan, shards, num_jobs, console)
    images, size = sum(s.images for s in shards), sum(s.bytes for s in shards)
    kept = sum(shard.how == "kept" for shard in shards)
    again = f" ({kept} kept from before)" if kept else ""
    _say(
        f"{plan.split}: {samples:,} samples, {images:,} images, {size:,} bytes in "
        f"{len(shards)} shard{'s' * (len(shards) > 1)}{again} → {plan.folder}",
        console,
    )
    if bad:
        _say(f"left out {len(bad):,}: {summary(bad)}; all of them: {listed}", console)
    if shortened := sum(shard.shortened for shard in shards):
        _say(
            f"of {shortened:,} samples the caption is kept, but not all else: CSV has no place for "
            "whole conversations, numbers of classes, and labels with '|' (webdataset has)",
            console,
        )
    _say(f"digest of the source  {packed}\ndigest as read back   {read}  equal", console)


def _say(message: str, console: Console) -> None:
    console.print(Text(message))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
