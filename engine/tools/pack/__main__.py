"""Datasets of any format → tar shards or the CSV folder form; see data/README.md.

    python -m engine.tools.pack SOURCE DEST --to webdataset|csv [options]

Images are copied byte for byte. Every shard is read back and compared by check sum, and at the end
DEST is read as a run would read it and compared with SOURCE, sample by sample. Exit codes: 0 done,
1 a fault, 2 a user error, 130 stopped by Ctrl-C.
"""

import argparse
import fcntl
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from engine import registry
from engine.config.load import load
from engine.config.schema import Data
from engine.data.bad_samples import summary
from engine.data.groups import group_rows
from engine.data.image_files import ENDINGS
from engine.data.sources import BUILT_IN, FORMATS, Split, open_source
from engine.data.views import JoinedCaptions, OneCaption
from engine.errors import FaultError, UserError, exit_code
from engine.flags import count
from engine.logs.samples import write_whole
from engine.tools import jobs
from engine.tools.pack.forms import COLUMNS, FOLDER, FORMS, Form
from engine.tools.pack.shards import Digest, Plan, Shard, check_shard, pack_shard

FORM = 2  # of what is written; raised when the same samples would be written otherwise
_LOOKED_AT = 1000  # files of a folder whose format is not named


def main(argv: Sequence[str]) -> int:
    """Pack; returns the exit code. Raises UserError and FaultError."""
    arguments = _parse(argv)
    both = arguments.split is None and arguments.valid_share
    for split in ("train", "valid") if both else (arguments.split or "train",):
        with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
            _pack_split(arguments, split, Path(scratch))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = jobs.Parser(
        "python -m engine.tools.pack",
        "Pack a dataset of any format into tar shards or the CSV folder form.",
        "train",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder; with --cfg a dataset's name")
    add("dest", metavar="DEST", type=Path, help="a new folder, or one begun before")
    add("--to", required=True, choices=tuple(FORMS))
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--cfg", type=Path, metavar="FILE", help="YAML with data.datasets.SOURCE")
    given.add_argument("--format", metavar="F", help="of SOURCE; default: what the folder shows")
    more = "of the format; repeatable"
    add("--option", type=_option, action="append", default=[], metavar="K=V", help=more)
    several = "of an image with several: all (default), joined into one text, or the first"
    add("--captions", choices=("all", "joined", "first"), default="all", help=several)
    share = "of a folder of images with texts beside them: the share that becomes the valid split"
    add("--valid-share", type=float, metavar="S", help=share)
    # img2dataset's default
    add("--shard-size", type=count, default=10_000, metavar="IMAGES")
    return parser.parse_args(argv)


def _option(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not a YAML value") from None


def _pack_split(arguments: argparse.Namespace, split: Split, scratch: Path) -> None:
    out, (name, data) = jobs.console(), _source_data(arguments)
    source = open_source(name, split, data, key="SOURCE")
    if arguments.captions != "all":
        groups = group_rows(source, scratch / "captions")
        joined = arguments.captions == "joined"
        source = JoinedCaptions(source, groups, " ") if joined else OneCaption(source, groups)
    form = FORMS[arguments.to](arguments.dest, split, arguments.shard_size)
    plan = Plan(source, group_rows(source, scratch), form)
    options = {"name": name, "data_path": data.data_path, **data.datasets.get(name, {})}
    with _held(form, _origin(plan, options, arguments.captions)):
        try:
            shards = []
            with jobs.progress_bar(f"packing {split}", len(source), out) as tick:
                for shard in jobs.each(pack_shard, plan, plan.shards, arguments.jobs, tick):
                    shards.append(shard)
                    if shard.how == "repaired":
                        what = form.content(shard.number)
                        out.print(f"{what} was damaged and has been packed anew")
            _finish(plan, shards, arguments.jobs, out)
        except KeyboardInterrupt:
            kept = sum(form.stats(number).exists() for number in plan.shards)
            jobs.console(stderr=True).print(
                f"stopped: {kept} of {len(plan.shards)} shards of {split} are finished and kept in "
                f"{form.dest}; the same command continues from there"
            )
            raise


# What is packed: a dataset of a YAML, a folder of a named format, or one that shows its format.


def _source_data(arguments: argparse.Namespace) -> tuple[str, Data]:
    """The name of the dataset that SOURCE means, and a configuration that has it.

    Raises UserError for what is not a dataset.
    """
    options = dict(arguments.option)
    if arguments.valid_share is not None:
        options["valid_share"] = arguments.valid_share
    if arguments.cfg is not None:
        data = load(arguments.cfg).data
        known = {**data.datasets}
        if options:
            if arguments.source not in known:
                raise UserError(f"--option needs {arguments.source!r} to be under data.datasets")
            known[arguments.source] = {**known[arguments.source], **options}
        return arguments.source, data.model_copy(update={"datasets": known})
    root = Path(arguments.source)
    if arguments.source in BUILT_IN and not root.exists():
        return arguments.source, Data()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "is not a folder"
        raise UserError(
            f"{root} {what}; name a dataset's folder, one of {', '.join(BUILT_IN)}, or with "
            "--cfg=FILE a dataset of that configuration"
        )
    form = arguments.format or _shown_format(root)
    registry.find(FORMATS, form, key=None)
    if arguments.valid_share is not None and form != "sidecar":
        raise UserError(f"--valid-share is for images with texts beside them, not format {form}")
    root = root.resolve()
    name = root.name or "source"
    dataset = {"format": form, "root": str(root), **options}
    return name, Data(data_path=str(root.parent), datasets={name: dataset})


def _shown_format(root: Path) -> str:
    """The format of a folder by the files in it. Raises UserError where none of them shows it."""
    for pattern, form in (
        ("*_anno.csv*", "csv"),
        ("*.tar", "webdataset"),
        ("*/*.tar", "webdataset"),
        ("dataset_dict.json", "huggingface"),
        ("state.json", "huggingface"),
        ("*.parquet", "parquet"),
        ("*_anno.tsv", "csv"),
    ):
        if next(root.glob(pattern), None) is not None:
            return form
    files = (path for path in root.rglob("*") if path.suffix[1:].lower() in ENDINGS)
    if any(path.with_suffix(".txt").is_file() for path in islice(files, _LOOKED_AT)):
        return "sidecar"
    there = ", ".join(sorted(path.name for path in islice(root.iterdir(), 5))) or "nothing"
    known = ", ".join(sorted(registry.names(FORMATS)))
    raise UserError(
        f"{root} does not show its format (there: {there}); name it as --format F, one of {known}"
    )


# Where it is packed to: a folder that holds nothing else, and one packer at a time.


def _origin(plan: Plan, options: dict[str, Any], captions: str) -> dict[str, Any]:
    """Everything that the content of the shards depends on, as JSON.

    An annotation file's table is named by the file's size and time.
    """
    grouping = plan.groups.path.name.rpartition(".groups.")[2]
    origin: dict[str, Any] = {
        "form": FORM,
        "to": plan.form.name,
        "split": plan.form.split,
        "dataset": options,
        "rows": len(plan.source),
        "images": len(plan.groups),
        "captions": captions,
        "shard_size": plan.form.shard_size,
        "state": plan.source.state or None,
        "grouping": grouping if captions == "all" else None,
    }
    return json.loads(json.dumps(origin, default=str))


@contextmanager
def _held(form: Form, origin: dict[str, Any]) -> Iterator[None]:
    """The destination, kept from other packers. Raises UserError where it holds anything else than
    a part of the same."""
    manifest = form.dest / FOLDER / f"{form.split}.json"
    _refuse_foreign(form, manifest, origin)
    try:
        form.folder.mkdir(parents=True, exist_ok=True)
        form.parts.mkdir(parents=True, exist_ok=True)
        manifest.parent.mkdir(exist_ok=True)
        with (manifest.parent / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is packing into {form.dest}") from None
            write_whole(manifest, json.dumps(origin, indent=1, ensure_ascii=False))
            yield
    except OSError as error:
        raise UserError(f"cannot pack into {form.dest}: {error}") from error


def _refuse_foreign(form: Form, manifest: Path, origin: dict[str, Any]) -> None:
    dest = form.dest
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file; name a new folder to pack into")
    there = sorted(path.name for path in dest.iterdir()) if dest.exists() else []
    if there and not manifest.parent.is_dir():
        raise UserError(
            f"{dest} holds something else ({', '.join(there[:5])}); name a new or an empty folder "
            "to pack into"
        )
    for path in sorted(manifest.parent.glob("*.json")):
        try:
            before = json.loads(path.read_bytes())
            if before["to"] != form.name:
                raise UserError(f"{dest} was packed to {before['to']}; name another folder")
            differing = "; ".join(
                f"{name} {before.get(name)!r}, now {origin[name]!r}"
                for name in origin
                if before.get(name) != origin[name]
            )
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path} is damaged; remove {dest} and pack again") from None
        if path == manifest and differing:
            raise UserError(
                f"{dest} was packed from something else or otherwise ({differing[:400]}); name "
                f"another folder, or remove it to pack again"
            )


def _finish(plan: Plan, shards: list[Shard], num_jobs: int, out: Console) -> None:
    """Name the bad samples, put a CSV together, compare, and report the counts."""
    form = plan.form
    bad = [record for shard in shards for record in shard.bad]
    samples = sum(shard.samples for shard in shards)
    if not samples:
        raise UserError(
            f"no sample of {plan.source.name!r} {form.split} can be used: {summary(bad)}"
        )
    used = {column for shard in shards for column in shard.columns}
    form.finish(sorted(used, key=COLUMNS.index), plan.shards)
    listed = form.folder / "bad_samples.jsonl"
    if bad:
        lines = (json.dumps(record.to_json(), ensure_ascii=False) + "\n" for record in bad)
        write_whole(listed, "".join(lines))
    packed = sum((shard.digest for shard in shards), Digest())
    read = _read_back(plan, shards, num_jobs, out)
    images, size = sum(s.images for s in shards), sum(s.bytes for s in shards)
    kept = sum(shard.how == "kept" for shard in shards)
    again = f" ({kept} kept from before)" if kept else ""
    out.print(
        f"{form.split}: {samples:,} samples, {images:,} images, {size:,} bytes in "
        f"{len(shards)} shard{'s' * (len(shards) > 1)}{again} → {form.folder}",
    )
    if bad:
        out.print(f"left out {len(bad):,}: {summary(bad)}; all of them: {listed}")
    if shortened := sum(shard.shortened for shard in shards):
        out.print(
            f"of {shortened:,} samples the caption is kept, but not all else: CSV has no place for "
            "whole conversations, numbers of classes, and labels with '|' (webdataset has)",
        )
    out.print(f"digest of the source  {packed}\ndigest as read back   {read}  equal")


def _read_back(plan: Plan, shards: Sequence[Shard], num_jobs: int, out: Console) -> Digest:
    """The digest of DEST, read as a run reads it. Raises FaultError, naming the shard, where it is
    not that of the source."""
    form, name = plan.form, plan.source.name
    options = {"format": form.name, "root": str(form.dest.absolute())}
    data = Data(data_path=str(form.dest.parent), datasets={name: options})
    packed = open_source(name, form.split, data, key=f"packed {form.dest}")
    total = sum(shard.samples for shard in shards)
    if len(packed) != total:
        raise FaultError(f"{form.dest} has {len(packed):,} samples where {total:,} were written")
    items, first = [], 0
    for shard in shards:
        items.append((first, shard.digest, form.content(shard.number)))
        first += shard.samples
    with jobs.progress_bar(f"checking {form.split}", total, out) as tick:
        digests = jobs.each(check_shard, packed, items, num_jobs, tick)
        return sum(digests, Digest())


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
