"""How a row's figures are shown: limit, ours, peer, their ratio, and whether it meets its mark."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

HEAD = ("what", "limit", "ours", "peer", "ratio", "mark", "")


@dataclass(frozen=True, slots=True)
class Options:
    """What every row is told. ``data``: a folder of datasets; without it shapes are drawn."""

    quick: bool = False  # tiny sizes: shows that the row runs, measures nothing
    threads: int = 1
    repeats: int = 5
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison. ``mark`` is ``≥ x`` or ``≤ x`` and is about ``ratio``."""

    what: str
    ours: float | None = None
    peer: float | None = None
    limit: float | None = None
    ratio: float | None = None
    mark: str = ""
    spread: float | None = None  # distance of the ratio's quartiles as a share of it
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the mark is met; None where there is none."""
        if not self.mark or self.ratio is None:
            return None
        sign, bound = self.mark.split()
        return self.ratio >= float(bound) if sign == "≥" else self.ratio <= float(bound)

    def cells(self) -> tuple[str, ...]:
        spread = f" ± {self.spread:.0%}" if self.spread is not None else ""
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}{spread}"
        figures = (_number(x, self.unit) for x in (self.limit, self.ours, self.peer))
        said = {None: "", True: "met", False: "missed"}[self.met]
        return (self.what, *figures, ratio, self.mark, said)


def table(lines: Iterable[Line], head: tuple[str, ...] = HEAD) -> str:
    """The lines as a Markdown table whose columns are aligned."""
    return markdown([head, *(line.cells() for line in lines)])


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells, the first of them the head."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in (rows[0], rule, *rows[1:])
    )


def machine(threads: int) -> str:
    """The processor and what else a figure hangs on, in one line."""
    cpu: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            name, _, value = line.partition(":")
            cpu.setdefault(name.strip(), value.strip())
    amx = "yes" if "amx_bf16" in cpu.get("flags", "").split() else "no"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{cpu.get('model name', 'unknown processor')}, amx_bf16 {amx}, {device}; "
        f"torch {torch.__version__}, {threads} threads of {os.cpu_count()} cores, load {load}; "
        f"{datetime.date.today().isoformat()}"
    )


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()
