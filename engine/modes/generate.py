"""``--mode=generate``: captions or labels of a folder of images, answers to a file of questions.

What is generated, and from what, says the task's evaluation (``engine.evals.evaluation``).

NAME.jsonl         a line an input; NAME is captions, answers or labels
captions_coco.json, answers_vqa.json     the official form of results
NAME.html          a page to look at
attention/IMAGE/   labels, with generate.attention: where each looked
bad_samples.jsonl  what was left out

What an earlier call has written stays until there is something to put in its place. The first
Ctrl-C ends with what has been done so far, in a folder ``partial`` of its own; a second one ends at
once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.bad_samples import BadRecord, BadSamples, summary
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.evaluation import Evaluations, Generation
from engine.evals.inputs import Inputs
from engine.evals.predict import Predictor
from engine.logs.progress import Progress, duration
from engine.logs.report import write_gallery
from engine.logs.samples import lines, make_writable, results, write_whole
from engine.run import Run

BAD = "bad_samples.jsonl"
PARTIAL = "partial"
NUM_SHOWN = 200  # examples on a page
_REPORT_SECONDS = 10.0


def run(run: Run) -> None:
    """Generate with the run's checkpoint what its task says. Raises UserError."""
    run.stop.saves = True
    generation = Evaluations(run).generation
    if generation is None:
        raise UserError(
            f"--mode=generate writes texts about images, which --task={run.task_name} does not "
            "learn; take --task=caption"
        )
    source = generation.inputs()
    output = Output(run, generation.name, len(source), generation.unit)
    module = run.model
    output.prepare()
    for closed in source.closed if collectives.rank() == 0 else ():
        run.warn(f"left out: {closed}")
    model = replace(Predictor.of_run(run, module), stopped=output.after_batch)
    found, bad = generation.predict(model, source, np.arange(len(source)))
    nothing = f"none of the {len(source)} {generation.unit}s of {source.origin} can be used"
    folder = output.settle(found, bad, nothing)
    if folder is None:
        return
    files = write(folder, generation, source, found)
    if not run.stop.requested:
        files += generation.more_files(folder, model, source, found)
    number = counted(found, generation.unit)
    Progress().message(f"{generation.title} {number}: {files}")


def write(folder: Path, generation: Generation, source: Inputs, found: Sequence[Any]) -> str:
    """The lines, the official form where there is one, and the page; returns their paths."""
    rows = [one.to_json() for one in found]
    table, page = (folder / f"{generation.name}.{ending}" for ending in ("jsonl", "html"))
    write_whole(table, lines(rows))
    if generation.results_file is not None:
        write_whole(folder / generation.results_file, results(rows))
    examples = [generation.example(source, one) for one in found[:NUM_SHOWN]]
    section = heading(examples, found, generation.unit)
    write_gallery(page, f"{generation.title} {source.origin}", section, examples)
    return f"{table}, {page}"


class Output:
    """Where what is generated goes, and how far it is.

    Args:
        name: of what is generated: ``captions``. Its folder is ``generate.output``, or of this name
            in the run's.
        total: number of inputs.
        what: one of them: ``image``.
    """

    def __init__(self, run: Run, name: str, total: int, what: str) -> None:
        self.run, self.name, self.total, self.what = run, name, total, what
        given = run.config.generate.output
        self.folder = Path(given) if given else run.run_dir / name
        self._batches = 0

    def prepare(self) -> None:
        """Make the folder, before hours of work are done for it. Raises UserError."""
        self._began = self._reported = time.monotonic()
        try:
            if collectives.rank() == 0:
                make_writable(self.folder)
        except OSError as error:
            raise UserError(
                f"no {self.name} can be written to {self.folder}: {error.strerror}; name another "
                "folder",
                key="generate.output",
            ) from error

    def after_batch(self) -> bool:
        """Report progress every few seconds; returns whether this process was asked to end."""
        self._batches += 1
        done = min(self.total, self._batches * self.run.config.generate.batch_size)
        now = time.monotonic()
        due = now - self._reported >= _REPORT_SECONDS and done < self.total
        if due and collectives.rank() == 0:
            self._reported = now
            rate = done / (now - self._began)
            Progress().message(
                f"{self.name}: {done:,} of {self.total:,} {self.what}s  {rate:.1f}/s  "
                f"ETA {duration((self.total - done) / rate)}"
            )
        return self.run.stop.requested

    def settle(self, done: Sequence[Any], bad: Sequence[BadRecord], nothing: str) -> Path | None:
        """The folder to write ``done`` to; None where this process has nothing to write.

        Reports which inputs were left out. Raises UserError ``nothing`` where none was of use.
        """
        stop, folder = self.run.stop, self.folder
        stopped = collectives.any_true(stop.requested)
        if not done and not stopped:
            raise UserError(f"{nothing}: {summary(bad)}", key="generate.input")
        if collectives.rank() != 0:
            return None
        if stopped:
            number = f"{len(done):,} of {self.total:,} {self.what}s done"
            self.run.warn(f"{stop.name or 'stopped'}: {number}; the rest is left out")
            if not done:
                return None
            folder = folder / PARTIAL
            folder.mkdir(exist_ok=True)
        (folder / BAD).unlink(missing_ok=True)
        if bad:
            BadSamples(folder / BAD, 1.0).add(list(bad), seen=self.total)
            self.run.warn(f"{counted(bad, self.what)} left out: {summary(bad)}")
        return folder


def counted(things: Sequence[Any], name: str) -> str:
    """``1 caption``, ``2,000 captions``."""
    return f"{len(things):,} {name}{'s' if len(things) != 1 else ''}"


def heading(shown: Sequence[Any], every: Sequence[Any], what: str) -> str:
    """Of a page: ``2 images``, or ``The first 200 of 1,000 images``."""
    first = f"The first {len(shown)} of " if len(shown) < len(every) else ""
    return first + counted(every, what)
