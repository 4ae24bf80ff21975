"""``--mode=generate``: captions or labels of a folder of images, answers to a file of questions.

captions.jsonl  answers.jsonl     labels.jsonl   a line an input
captions_coco.json  answers_vqa.json             the official form of results
captions.html   answers.html      labels.html    a page to look at
attention/IMAGE/                                 labels, with generate.attention: where each looked
bad_samples.jsonl                                what was left out

What an earlier call has written stays until there is something to put in its place. The first
Ctrl-C ends with what has been done so far, in a folder ``partial`` of its own; a second one ends at
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from engine.config.schema import Generate
from engine.data.bad_samples import BadRecord, BadSamples, summary
from engine.data.loader import valid_batches
from engine.dist import collectives
from engine.errors import UserError
from engine.evals import answers
from engine.evals.encode import Encoder, evaluating
from engine.evals.gallery import spoken
from engine.evals.input_images import Folder, open_folder
from engine.evals.question_files import KEY, Questions
from engine.evals.run import Evaluations
from engine.logs.gallery import Example, weight_map
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
    form = next((_FORMS[one] for one in run.task.modalities if one in _FORMS), None)
    if form is None:
        raise UserError(
            f"--mode=generate writes texts about images, which --task={run.task_name} does not "
            "learn; take --task=caption"
        )
    evaluations = Evaluations(run)
    source = form.open(run.config.generate)
    output = Output(run, form.name, len(source), form.input)
    predict = form.predictor(evaluations)
    module = run.model
    output.prepare()
    if isinstance(source, Folder) and collectives.rank() == 0:
        for closed in source.closed:
            run.warn(f"left out: {closed}")
    encoder = evaluations.encoder(module)
    found, bad = predict(encoder, source, np.arange(len(source)), output.after_batch)
    folder = output.settle(found, bad, form.nothing(source))
    if folder is None:
        return
    page = write(folder, form, source, found, run.config.data.max_image_pixels)
    message = f"{form.counted(found)}: {folder / form.name}.jsonl, {page}"
    if form.name == "labels" and run.config.generate.attention and not output.stopped:
        number = write_attention(folder / "attention", encoder, source, found)
        message += f", {number} pictures: {folder / 'attention'}"
    Progress().message(message)


Predict = Callable[
    [Encoder, Any, np.ndarray, Callable[[], bool]], tuple[Sequence[Any], list[BadRecord]]
]
"""(encoder, source, rows, whether to stop) → predictions, and what could not be read."""


class Captions:
    """One caption of each image of a folder."""

    name, input, official, title = "captions", "image", "captions_coco.json", "Captions of"

    def open(self, section: Generate) -> Any:
        """The inputs. Raises UserError."""
        return open_folder(section.input)

    def nothing(self, source: Any) -> str:
        """The message where no input is of use."""
        return f"none of the {len(source)} images in {source.root} can be read"

    def counted(self, found: Sequence[Any]) -> str:
        return counted(found, self.name.removesuffix("s"))

    def predictor(self, evaluations: Evaluations) -> Predict:
        """What predicts. Raises UserError for settings that cannot be served."""
        from engine.evals.captions import speak  # with its scorers, which take a while to import

        config, ranker = evaluations.config, evaluations.judge("ranker")
        instruction = config.data.prompt.instruction
        return lambda encoder, source, rows, stopped: speak(
            encoder, source, rows, config.generate, instruction, ranker, stopped
        )

    def example(self, source: Any, one: Any, max_pixels: int) -> Example:
        """A prediction to look at."""
        return spoken(source, one, max_pixels)


class Labels(Captions):
    """Labels of each image of a folder, with probabilities."""

    name, official, title = "labels", None, "Labels of"

    def counted(self, found: Sequence[Any]) -> str:
        return f"labels of {counted(found, 'image')}"

    def predictor(self, evaluations: Evaluations) -> Predict:
        from engine.evals.recognition import recognise  # with transformers

        ranker, _ = evaluations.judges.of_labels(evaluations.task)

        def predict(
            encoder: Encoder, source: Any, rows: np.ndarray, stopped: Callable[[], bool]
        ) -> tuple[Sequence[Any], list[BadRecord]]:
            section = evaluations.config.generate
            found, _, bad = recognise(encoder, source, rows, section, ranker, stopped=stopped)
            return found, bad

        return predict

    def example(self, source: Any, one: Any, max_pixels: int) -> Example:
        from engine.evals.recognised import shown

        return shown(source, one, max_pixels)


class Answers(Captions):
    """Answers to the questions of a file."""

    name, input, official, title = "answers", "question", "answers_vqa.json", "Answers to"

    def open(self, section: Generate) -> Any:
        answers.choices(section)
        name = section.input
        if name is None or not Path(name).is_file():
            what = "--mode=generate" if name is None else f"there is no file {name}"
            raise UserError(f"{what}: input=FILE names a CSV or JSON file of questions", key=KEY)
        return Questions(Path(name), Path(section.images) if section.images else None)

    def nothing(self, source: Any) -> str:
        return f"none of the {len(source)} questions of {source.path} can be asked"

    def predictor(self, evaluations: Evaluations) -> Predict:
        from engine.evals.vqa import answer  # with transformers

        section = evaluations.config.generate
        return lambda encoder, source, rows, stopped: answer(
            encoder, source, rows, section, stopped=stopped
        )

    def example(self, source: Any, one: Any, max_pixels: int) -> Example:
        return answers.shown(source, one, max_pixels)


_FORMS = {"caption": Captions(), "labels": Labels(), "answer": Answers()}  # by what is learned


def write(folder: Path, form: Captions, source: Any, found: Sequence[Any], max_pixels: int) -> Path:
    """The lines, the official form where there is one, and the page, whose path is returned."""
    rows = [one.to_json() for one in found]
    write_whole(folder / f"{form.name}.jsonl", lines(rows))
    if form.official is not None:
        write_whole(folder / form.official, results(rows))
    examples = [form.example(source, one, max_pixels) for one in found[:NUM_SHOWN]]
    section = heading(examples, found, form.input)
    page = folder / f"{form.name}.html"
    inputs = source.path if isinstance(source, Questions) else source.root
    write_gallery(page, f"{form.title} {inputs}", section, examples)
    return page


def write_attention(
    folder: Path, encoder: Encoder, source: Folder, found: Sequence[Any]
) -> int:
    """A picture for each label of each image; returns their number.

    The image is shown as the model saw it, cropped and squeezed by the transforms.
    """
    from engine.generate.attention import attention_maps

    model: Any = encoder.model
    task: Any = encoder.task
    labels = {one.row: one for one in found}
    number = 0
    batches = valid_batches(
        source, np.asarray(sorted(labels)), encoder.transform, task.pictures,
        batch_size=1, rank=0, world=1, num_workers=encoder.num_workers, limits=encoder.limits,
    )  # fmt: skip
    with evaluating(model):
        for _, batch, _ in batches:
            if not batch:
                continue
            one = labels[int(batch["index_B"][0])]
            image_1CHW = batch["image_BCHW"].to(encoder.device)
            with encoder.autocast():
                maps = attention_maps(task, model, image_1CHW, [a.ids for a in one.labels])
            seen = Image.fromarray(image_1CHW[0].permute(1, 2, 0).cpu().numpy())
            place = folder / one.image_id
            place.mkdir(parents=True, exist_ok=True)
            for earlier in place.glob("[0-9][0-9]_*.png"):  # of other labels
                earlier.unlink()
            for rank, (label, weight_hw) in enumerate(zip(one.labels, maps, strict=True), 1):
                drawn = weight_map(
                    seen, weight_hw.cpu().numpy(), f"{label.text}  {label.prob:.3f}"
                )
                drawn.save(place / f"{rank:02d}_{quote(label.text, safe=' ')[:80]}.png")
                number += 1
    return number


class Output:
    """Where what is generated goes, and how far it is.

    Args:
        name: of what is generated: ``captions``. Its folder is ``generate.output``, or of this name
            in the run's.
        total: number of inputs.
        what: one of them: ``image``.
        clock: seconds.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        total: int,
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.name, self.total, self.what = run, name, total, what
        given = run.config.generate.output
        self.folder = Path(given) if given else run.run_dir / name
        self._clock, self._batches = clock, 0
        self._began = self._reported = clock()

    def prepare(self) -> None:
        """Make the folder, before hours of work are done for it. Raises UserError."""
        self._began = self._reported = self._clock()
        if collectives.rank() != 0:
            return
        try:
            make_writable(self.folder)
        except OSError as error:
            raise UserError(
                f"no {self.name} can be written to {self.folder}: {error.strerror}; name another "
                "folder",
                key="generate.output",
            ) from error

    @property
    def stopped(self) -> bool:
        """Whether this process was asked to end."""
        return self.run.stop.requested

    def after_batch(self) -> bool:
        """Report progress every few seconds; returns whether this process was asked to end."""
        self._batches += 1
        done = min(self.total, self._batches * self.run.config.generate.batch_size)
        now = self._clock()
        due = now - self._reported >= _REPORT_SECONDS and done < self.total
        if due and collectives.rank() == 0:
            self._reported = now
            rate = done / (now - self._began)
            Progress().message(
                f"{self.name}: {done:,} of {self.total:,} {self.what}s  {rate:.1f}/s  "
                f"ETA {duration((self.total - done) / rate)}"
            )
        return self.stopped

    def settle(self, done: Sequence[Any], bad: Sequence[BadRecord], nothing: str) -> Path | None:
        """The folder to write ``done`` to; None where this process has nothing to write.

        Reports which inputs were left out. Raises UserError ``nothing`` where none was of use.
        """
        stopped = collectives.any_true(self.stopped)
        if not done and not stopped:
            raise UserError(f"{nothing}: {summary(bad)}", key="generate.input")
        if collectives.rank() != 0:
            return None
        folder = self.folder
        if stopped:
            number = f"{len(done):,} of {self.total:,} {self.what}s done"
            self.run.warn(f"{self.run.stop.name or 'stopped'}: {number}; the rest is left out")
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
