"""``--mode=generate`` of ``--task=vqa``: answers to a file of questions, and a page to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.data.bad_samples import BadSamples, summary
from engine.dist import collectives
from engine.errors import UserError
from engine.evals.answers import Answer, choices, shown
from engine.evals.question_files import KEY, Questions
from engine.evals.vqa import answer
from engine.logs.progress import Progress
from engine.logs.report import write_gallery
from engine.logs.samples import lines, make_writable, results, write_whole
from engine.setup import Setup

BAD = "bad_samples.jsonl"
_NUM_SHOWN = 200  # questions on the page


def generate(setup: Setup) -> None:
    """Answer the questions of ``generate.input`` with the run's checkpoint. Raises UserError."""
    section = setup.config.generate
    choices(section)
    source = _questions(section.input, section.images)
    folder = Path(section.output) if section.output else setup.run_dir / "answers"
    module, _ = setup.trained_model()
    if collectives.rank() == 0:
        _prepare(folder)
    encoder = setup.evaluate.encoder(module)
    stop = setup.stop
    answers, bad = answer(
        encoder, source, np.arange(len(source)), section, stopped=lambda: stop.requested
    )
    stopped = collectives.any_true(stop.requested)
    if not answers and not stopped:
        raise UserError(
            f"none of the {len(source)} questions of {source.path} can be asked: {summary(bad)}",
            key=KEY,
        )
    if collectives.rank() != 0:
        return
    if stopped:
        done = f"{len(answers)} of {len(source)} questions are answered"
        setup.warn(f"{stop.name or 'stopped'}: {done}; the rest is left out")
        if not answers:
            return
    (folder / BAD).unlink(missing_ok=True)
    if bad:
        BadSamples(folder / BAD, 1.0).add(bad, seen=len(source))
        setup.warn(f"{len(bad)} questions left out: {summary(bad)}")
    write(folder, source, answers, setup.config.data.max_image_pixels)
    number = f"{len(answers)} answer" + "s" * (len(answers) != 1)
    Progress().message(f"{number}: {folder / 'answers.jsonl'}, {folder / 'answers.html'}")


def _questions(name: str | None, images: str | None) -> Questions:
    if name is None or not Path(name).is_file():
        what = "--mode=generate" if name is None else "there is no file " + name
        raise UserError(f"{what}: input=FILE names a CSV or JSON file of questions", key=KEY)
    return Questions(Path(name), Path(images) if images else None)


def _prepare(folder: Path) -> None:
    """Make the folder that is written to, before hours of work are done for it. UserError.

    What an earlier call wrote there stays until there is something in its place.
    """
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(
            f"no answers can be written to {folder}: {error.strerror}", key="generate.output"
        ) from error


def write(folder: Path, source: Questions, answers: list[Answer], max_pixels: int) -> None:
    """``answers.jsonl``, the official results form ``answers_vqa.json``, and ``answers.html``."""
    rows = [one.to_json() for one in answers]
    write_whole(folder / "answers.jsonl", lines(rows))
    write_whole(folder / "answers_vqa.json", results(rows))
    examples = [shown(source, one, max_pixels) for one in answers[:_NUM_SHOWN]]
    number = len(answers)
    section = f"The first {len(examples)} of {number:,}" if len(examples) < number else "All"
    write_gallery(folder / "answers.html", f"Answers to {source.path}", section, examples)
