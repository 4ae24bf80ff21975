"""``--mode=generate`` of ``--task=vqa``: answers to a file of questions, and a page to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.evals.answers import Answer, choices, shown
from engine.evals.question_files import KEY, Questions
from engine.evals.vqa import answer
from engine.generated import NUM_SHOWN, Output, counted, heading
from engine.logs.progress import Progress
from engine.logs.report import write_gallery
from engine.logs.samples import lines, results, write_whole
from engine.setup import Setup


def generate(setup: Setup) -> None:
    """Answer the questions of ``generate.input`` with the run's checkpoint. Raises UserError."""
    section = setup.config.generate
    choices(section)
    source = _questions(section.input, section.images)
    output = Output(setup, "answers", len(source), "question")
    module, _ = setup.trained_model()
    output.prepare()
    encoder = setup.evaluate.encoder(module)
    rows = np.arange(len(source))
    answers, bad = answer(encoder, source, rows, section, stopped=output.after_batch)
    nothing = f"none of the {len(source)} questions of {source.path} can be asked"
    folder = output.settle(answers, bad, nothing)
    if folder is None:
        return
    write(folder, source, answers, setup.config.data.max_image_pixels)
    Progress().message(
        f"{counted(answers, 'answer')}: {folder / 'answers.jsonl'}, {folder / 'answers.html'}"
    )


def _questions(name: str | None, images: str | None) -> Questions:
    if name is None or not Path(name).is_file():
        what = "--mode=generate" if name is None else "there is no file " + name
        raise UserError(f"{what}: input=FILE names a CSV or JSON file of questions", key=KEY)
    return Questions(Path(name), Path(images) if images else None)


def write(folder: Path, source: Questions, answers: list[Answer], max_pixels: int) -> None:
    """``answers.jsonl``, the official results form ``answers_vqa.json``, and ``answers.html``."""
    rows = [one.to_json() for one in answers]
    write_whole(folder / "answers.jsonl", lines(rows))
    write_whole(folder / "answers_vqa.json", results(rows))
    examples = [shown(source, one, max_pixels) for one in answers[:NUM_SHOWN]]
    section = heading(examples, answers, "question")
    write_gallery(folder / "answers.html", f"Answers to {source.path}", section, examples)
