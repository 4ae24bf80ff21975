"""What is in the data of a configuration: counts, histograms, copies, bad samples, a contact sheet.

    python -m engine.tools.inspect CFG [section.key=value …] [options]

Prints a table and writes, into --output, ``inspect.html`` (opens without network), a contact sheet
``sheet_<dataset>_<split>.png`` each, ``copies.jsonl`` and ``bad_samples.jsonl``. Exit codes: 0
done, 1 a fault, 2 a user error, 130 stopped by Ctrl-C.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from engine.config.load import load_with_places
from engine.config.schema import Config
from engine.data.groups import group_rows
from engine.data.sources import Split, open_dataset, open_source
from engine.errors import UserError, exit_code
from engine.flags import count
from engine.logs.samples import write_whole
from engine.tools import jobs
from engine.tools.inspect import report
from engine.tools.inspect.scan import Part, Work, scan


def main(argv: Sequence[str]) -> int:
    """Inspect; returns the exit code. Raises UserError and FaultError."""
    arguments = _parse(argv)
    loaded = load_with_places(arguments.cfg, arguments.overrides)
    try:
        _inspect(arguments, loaded.config)
    except UserError as error:
        raise UserError(loaded.located(error), key=error.key) from error
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = jobs.Parser(
        "python -m engine.tools.inspect",
        "Count, measure and show the datasets that a configuration names.",
        "both",
    )
    parser.add_argument("cfg", metavar="CFG", type=Path, help="a run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--limit", type=count, metavar="N", help="images of each dataset, evenly spread"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN FOLDER/inspect")
    return parser.parse_intermixed_args(argv)


def _inspect(arguments: argparse.Namespace, config: Config) -> None:
    console = jobs.console()
    name = config.data.exp_name or arguments.cfg.stem
    run_dir = Path(config.ckpt.dir) / name
    output = arguments.output or run_dir / "inspect"
    with tempfile.TemporaryDirectory(prefix="inspect-") as scratch:
        parts = _open_parts(config, arguments.split, arguments.limit, Path(scratch))
        tokenizer, max_tokens = _tokenizer(config, run_dir)
        work = Work(parts, tokenizer, config.data.max_image_pixels, config.data.max_caption_chars)
        try:
            output.mkdir(parents=True, exist_ok=True)
            findings = scan(work, max_tokens, arguments.jobs, console, output)
            for part in parts:
                report.write_sheet(output, part.title, part.counts.examples)
            write_whole(output / "inspect.html", report.page(name, findings))
        except OSError as error:
            raise UserError(f"cannot write into {output}: {error}") from error
        report.show(findings, console)
    console.print(f"report: {output / 'inspect.html'}")


def _open_parts(config: Config, split: str | None, limit: int | None, scratch: Path) -> list[Part]:
    """The datasets of both splits, or of one; which rows are of one image is kept in ``scratch``.

    Raises UserError where the configuration names no datasets.
    """
    data, parts = config.data, []
    for each in get_args(Split):
        names = data.train_name if each == "train" else data.valid_name
        for name in names if split in (None, each) else ():
            source = open_source(name, each, data, key=f"data.{each}_name")
            groups = group_rows(source, scratch)
            images = _spread(len(groups), limit)
            shown = frozenset(images[_spread(len(images), report.COLUMNS * report.ROWS)].tolist())
            parts.append(Part(source, groups, images, shown))
    if not parts:
        keys = f"data.{split}_name" if split else "data.train_name and data.valid_name"
        raise UserError(f"there is nothing to inspect: {keys} is empty; name datasets there")
    return parts


def _spread(number: int, limit: int | None) -> np.ndarray:
    """``limit`` of ``number`` places, evenly spread; all where there is no limit."""
    if limit is None or limit >= number:
        return np.arange(number)
    return np.arange(limit) * number // limit


def _tokenizer(config: Config, run_dir: Path) -> tuple[dict, int]:
    """The state of the tokenizer of the run, or of what it would have, and how much it keeps.

    That of the decoder where the configuration describes one and no text encoder.
    """
    from engine.data.text.tokenizer import choose as choose_tokenizer

    described = config.model.model_fields_set
    of_decoder = "decoder" in described and "text_encoder" not in described
    part = "decoder" if of_decoder else "text_encoder"
    data = config.data

    def captions() -> Iterator[str]:
        for name in data.train_name:
            yield from open_dataset(name, "train", data, key="data.train_name").captions()

    tokenizer = choose_tokenizer(config, [run_dir], captions, part)
    return tokenizer.state(), getattr(config.model, part).max_length


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
