"""The command line: flags and overrides → one value. Imports nothing heavy: --help is instant."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.errors import UserError


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line as values."""

    task: str
    cfg: Path
    mode: str = "train"
    exp_name: str | None = None
    overrides: tuple[str, ...] = ()  # the experiment's name is among them
    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"command line: {message}; see {self.prog} --help")


def parse(argv: Sequence[str], tasks: Sequence[str] = (), modes: Sequence[str] = ()) -> Arguments:
    """Read a command line (without the program's name).

    ``tasks`` are named in the help; a mode is one of ``modes``, or a module's dotted name.
    Raises UserError for what cannot be read, SystemExit(0) after ``--help``.
    """
    parser = _parser(tasks, modes)
    values, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flag = next((w.partition("=")[0] for w in unknown if w.startswith("-")), unknown[0])
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        parser.error(f"unknown flag {flag}" + (f", did you mean {close[0]}?" if close else ""))
    if values.exp_name is not None:
        values.overrides.append(f"data.exp_name={json.dumps(values.exp_name)}")
    if not 0 <= values.node_rank < values.nnodes:
        given = f"--node_rank={values.node_rank} of --nnodes={values.nnodes}"
        raise UserError(f"command line: {given}; nodes are counted from 0")
    if values.nnodes > 1 and not (values.master_addr and values.master_port):
        raise UserError(
            "command line: several nodes need a place to meet; give --master_addr=HOST of the "
            "first node and --master_port=PORT, the same on all nodes"
        )
    return Arguments(**{**vars(values), "overrides": tuple(values.overrides)})


def _parser(tasks: Sequence[str], modes: Sequence[str]) -> _Parser:
    parser = _Parser(
        prog="launch.py",
        description="Pretrain, evaluate or check a vision-language model described by one YAML.",
        epilog="Exit codes: 0 done, 1 a fault, 2 a user error, 130 a second Ctrl-C.",
        allow_abbrev=False,
    )
    known = ": " + ", ".join(tasks) if tasks else ""
    parser.add_argument("--task", required=True, help="what is trained" + known)
    parser.add_argument("--cfg", required=True, type=Path, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "--mode",
        type=partial(_mode, modes),
        metavar="{" + ",".join(modes) + "}",
        default="train",
        help="train (default); eval: score a checkpoint; generate: texts for a "
        "folder of images (input=DIR) or a file of questions (input=FILE); export: weights for "
        "other programs; check: show the resolved run and stop; or a module's dotted name",
    )
    parser.add_argument("--exp_name", help="name of the run's folder, instead of data.exp_name")
    nodes = parser.add_argument_group("processes (torchrun sets these itself)")
    nodes.add_argument("--nproc_per_node", type=count, default=1, metavar="N", help="default 1")
    nodes.add_argument("--nnodes", type=count, default=1, metavar="N", help="default 1")
    nodes.add_argument("--node_rank", type=int, default=0, metavar="R", help="0 … nnodes - 1")
    nodes.add_argument("--master_addr", metavar="HOST", help="host of the node with rank 0")
    nodes.add_argument("--master_port", type=int, metavar="PORT", help="a free port there")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the YAML"
    )
    return parser


def _mode(known: Sequence[str], text: str) -> str:
    if known and text not in known and "." not in text:
        choices = ", ".join(map(repr, known))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {choices})")
    return text


def count(text: str) -> int:
    """A whole number of at least 1, for a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
