"""VQAScore: how well texts fit images, as the probability of "Yes" (Lin et al. 2024).

A model of --task=vqa is asked, of each image and text, whether the figure shows the text; the score
is exp(−mean cross-entropy of the answer's tokens, its end included). It is differentiable, down to
the images. ``python -m engine.evals.vqa_score`` scores a CSV: see ``engine.evals.score_tables``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from engine.data.decode import decode_by
from engine.data.text.templates import Template
from engine.data.text.templates import template as find_template
from engine.data.transforms import pipeline
from engine.errors import UserError, exit_code
from engine.evals import score_tables
from engine.evals.predict import evaluating
from engine.flags import count
from engine.generate.likelihood import log_likelihoods
from engine.models.vision_language import VisionLanguage
from engine.run import Run, warn_on_stderr
from engine.tasks.vqa import VqaTask
from engine.train.signals import StopRequest
from engine.types import BadSample, Task

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"
_MOST_NAMED = 20  # of what is left out

Picture = str | Path | bytes | Image.Image | Tensor
"""A file, its bytes, an image, or a tensor CHW: uint8, or floats of 0 … 1."""


class VQAScore:
    """A model's opinion of images and texts.

    Args:
        model: the folder of a run or of a checkpoint, or a model with its ``task``.
        task: that which made the model.
        question: what is asked; ``{}`` is the text's place.
        answer: that whose likelihood is the score; ``{}`` here, and an empty question, score how
            likely the model is to say the text itself.
        against: another answer; the score is then P(answer) among these two, each with its end.
        template: a prompt template other than that which the model was trained with.
        batch_size: pairs that the model reads at once (64; on a CPU 32); of images, a quarter.
        device: of a run that is opened; by default a GPU if there is one.

    Raises UserError for a question and an answer without the text, and for an unknown template.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        task: Task | None = None,
        *,
        question: str = QUESTION,
        answer: str = ANSWER,
        against: str | None = None,
        template: str | None = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if isinstance(model, str | Path):
            run = Run.open(Path(model), "vqa", key="model", device=device, warn=warn_on_stderr)
            self.autocast, task = run.precision.autocast, run.task
            model = run.model.to(run.precision.weights).requires_grad_(False)
        if task is None:
            raise ValueError("a model needs the task that made it, for its prompts and tokens")
        self.model, self.task = cast(VisionLanguage, model), cast(VqaTask, task)
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.batch_size = batch_size or (32 if on_cpu else 64)  # by what caches hold
        if sorted(each.count("{}") for each in (question, answer)) not in ([0, 1], [1, 1]):
            given = f"{question!r}, {answer!r}"
            raise UserError(f"the question or the answer must have {{}} in it, once: {given}")
        self.question, self.answers = question, [answer] if against is None else [answer, against]
        config = task.config
        instruction = config.data.prompt.instruction
        self.template: Template | None = None
        if template:
            self.template = find_template(template, key="template", instruction=instruction)
        self.max_pixels = config.data.max_image_pixels
        self.transform = pipeline.for_split(config, "valid")

    def __call__(
        self, images: Sequence[Picture] | Tensor, texts: Sequence[str], *, grad: bool = False
    ) -> Tensor:
        """Scores [M, N] of each image with each text, in fp32 or wider, on the model's device.

        With ``grad`` the result has a graph, back to float images that ask for a gradient. Raises
        BadSample for an image that cannot be read and for a text that cannot be asked about.
        """
        if not len(images) or not texts:
            raise ValueError(f"{len(images)} images and {len(texts)} texts have no scores")
        for error in self._refused(texts).values():
            raise error
        places = [place for place in range(len(images)) for _ in texts]
        with torch.set_grad_enabled(grad), evaluating(self.model):
            tokens_MND = self._tokens([self._pixels(image) for image in images])
            scores = self._score(tokens_MND, places, [*texts] * len(images))
        return scores.view(len(images), len(texts))

    def pairs(
        self,
        images: Sequence[Picture],
        texts: Sequence[str],
        *,
        grad: bool = False,
        bad: Callable[[Picture, BadSample], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Scores [P] of each image with the text in the same place.

        An image that returns is read and encoded once; a window of images is in memory at a time.
        One that cannot be read, and a text that cannot be asked about, is given to ``bad`` and
        scores NaN, or without it raises BadSample. ``stopped`` is asked between two windows whether
        to leave out the rest, as NaN.
        """
        if bad is None:
            bad = _raise
        refused = self._refused(texts)
        for text, error in refused.items():
            bad(text, error)
        of_image: dict[Any, list[int]] = {}
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if text not in refused:
                key = str(image) if isinstance(image, str | Path) else id(image)
                of_image.setdefault(key, []).append(place)
        groups, parts, order = list(of_image.values()), [], []
        with torch.set_grad_enabled(grad), evaluating(self.model):
            for start in range(0, len(groups), self.batch_size):
                if stopped():
                    break
                pixels, owner, rows = [], [], []
                for group in groups[start : start + self.batch_size]:
                    image = images[group[0]]
                    try:
                        pixels.append(self._pixels(image))
                    except BadSample as error:
                        bad(image, error)
                        continue
                    owner += [len(pixels) - 1] * len(group)
                    rows += group
                if pixels:
                    chosen = [texts[row] for row in rows]
                    parts.append(self._score(self._tokens(pixels), owner, chosen))
                    order += rows
        blank = torch.full((len(texts),), torch.nan, device=self.model.mean_C11.device)
        if not parts:
            return blank
        found = torch.cat(parts)
        return blank.to(found).index_copy(0, torch.tensor(order, device=found.device), found)

    def batch(
        self, dataset: Iterable[Mapping[str, Sequence[Any]]], *, grad: bool = False
    ) -> Tensor:
        """Scores [S, M, N] of samples ``{"images": [M], "texts": [N]}``, all of one size.

        As ``pairs``: samples share batches. Raises ValueError where they differ in size.
        """
        samples = [(list(sample["images"]), list(sample["texts"])) for sample in dataset]
        sizes = {(len(images), len(texts)) for images, texts in samples}
        if len(sizes) != 1:
            raise ValueError(f"samples must have as many images and texts each, not {sizes}")
        pairs = [pair for images, texts in samples for pair in product(images, texts)]
        scores = self.pairs([image for image, _ in pairs], [text for _, text in pairs], grad=grad)
        return scores.view(len(samples), *sizes.pop())

    def _score(self, tokens_MND: Tensor, places: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Scores [P] of texts with the images at ``places``; texts of like length share a batch."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [torch.empty(0, device=tokens_MND.device)]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            prompts = [self._prompt(texts[i]) for i in chosen]
            targets = [self._targets(texts[i]) for i in chosen]
            place_B = torch.tensor([places[i] for i in chosen], device=tokens_MND.device)
            given = self.task, self.model, tokens_MND[place_B], prompts, targets
            with self.autocast():
                found = log_likelihoods(*given, template=self.template)
            log_p_BA = found.log_p_R.view(len(chosen), -1)
            if len(self.answers) > 1:
                parts.append(log_p_BA.softmax(1)[:, 0])
            else:
                parts.append((log_p_BA[:, 0] / found.tokens_R).exp())
        back = torch.tensor(order, device=tokens_MND.device).argsort()
        return torch.cat(parts)[back]

    def _tokens(self, pixels: Sequence[Tensor]) -> Tensor:
        """Image tokens [M, N, D] of what ``_pixels`` gave, each image encoded once."""
        size = max(1, self.batch_size // 4)
        parts = []
        for start in range(0, len(pixels), size):
            with self.autocast():
                parts.append(self.model.image_tokens(torch.stack([*pixels[start : start + size]])))
        return torch.cat(parts)

    def _pixels(self, image: Picture) -> Tensor:
        """Normalised floats CHW on the model's device. Raises BadSample.

        Floats are stretched to the model's size where they are of another, and keep their graph;
        all else goes through the transforms of evaluation.
        """
        mean_C11, std_C11 = self.model.mean_C11, self.model.std_C11
        if isinstance(image, Tensor) and image.is_floating_point():
            image_CHW = image.to(mean_C11)
            if image_CHW.shape[1:] != self.transform.size:
                image_CHW = nn.functional.interpolate(
                    image_CHW[None], self.transform.size, mode="bilinear", antialias=True
                )[0]
            return (255 * image_CHW - mean_C11) / std_C11
        if isinstance(image, str | Path | bytes):
            image = decode_by(
                self.transform.decoder,
                Path(image) if isinstance(image, str) else image,
                max_pixels=self.max_pixels,
                target=self.transform.decode_size,
            )
        elif isinstance(image, Image.Image):
            image = image.convert("RGB")
        return (self.transform(image).to(mean_C11) - mean_C11) / std_C11

    def _prompt(self, text: str) -> str:
        return self.question.replace("{}", text)

    def _targets(self, text: str) -> list[str]:
        return [each.replace("{}", text) for each in self.answers]

    def _refused(self, texts: Sequence[str]) -> dict[str, BadSample]:
        """Of the texts those that the model cannot be asked about, and why."""
        found, limit = {}, self.task.max_length
        for text in dict.fromkeys(texts):
            try:
                ids_1P = self.task.prompts([self._prompt(text)], template=self.template)[0]
                longest = max(len(self.task.answer_ids(each)) for each in self._targets(text))
                if ids_1P.shape[1] > limit or longest > self.task.room(ids_1P):
                    raise BadSample(
                        "prompt too long",
                        f"{ids_1P.shape[1]} tokens, and {longest} of the answer, "
                        f"model.decoder.max_length {limit}",
                    )
            except BadSample as error:
                found[text] = BadSample(error.cause, f"{error.detail}: {text[:80]!r}")
        return found


def _raise(thing: Picture, error: BadSample) -> None:
    raise error


def main(argv: Sequence[str]) -> int:
    """Score a CSV, print its figures as JSON; returns the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.evals.vqa_score", description=score_tables.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="folder of a --task=vqa run")
    parser.add_argument("--csv", type=Path, required=True, help="images and texts")
    parser.add_argument("--images", type=Path, help="folder of the images; default: the CSV's")
    parser.add_argument("--out", type=Path, help="default: vqa_score/NAME in the run's folder")
    parser.add_argument("--group_by", metavar="COLUMN", help="compare pairs of rows within it")
    parser.add_argument("--question", default=QUESTION, help="{} is the text (%(default)s)")
    parser.add_argument("--answer", default=ANSWER, help="{} here, too (%(default)s)")
    parser.add_argument("--against", metavar="NO", help="score P(answer) among these two")
    parser.add_argument("--template", help="a prompt template; default: the model's own")
    parser.add_argument("--batch_size", type=count)
    parser.add_argument("--device", help="default: cuda if there is one")
    given = parser.parse_args(argv)
    table = score_tables.read(given.csv, given.group_by)
    score = VQAScore(
        given.model, question=given.question, answer=given.answer, against=given.against,
        template=given.template, batch_size=given.batch_size, device=given.device,
    )  # fmt: skip
    root = given.images or given.csv.parent
    bad: dict[str, str] = {}
    pairs = table.pairs()
    with StopRequest() as stop:
        scores = score.pairs(
            [root / image for image, _ in pairs],
            [text for _, text in pairs],
            bad=lambda thing, error: bad.update({str(thing): str(error)}),
            stopped=lambda: stop.requested,
        ).tolist()
    num_scored = sum(not math.isnan(score) for score in scores)
    if not num_scored and not stop.requested:
        why = next(iter(bad.values()))
        raise UserError(f"none of the pairs of {given.csv}, images in {root}, can be scored: {why}")
    named = list(bad.items())[: _MOST_NAMED if num_scored else 0]
    for thing, why in named:
        warn_on_stderr(f"{thing[-200:]} is left out: {why}")
    if num_scored and len(bad) > len(named):
        warn_on_stderr(f"and {len(bad) - len(named)} more are left out")
    if stop.requested:
        done = f"{num_scored} of {len(scores)} pairs are scored"
        warn_on_stderr(f"{stop.name}: {done}; the rest is left out")
    if not num_scored:
        return 130
    figures = table.figures(scores, given.group_by)
    out = given.out or given.model / "vqa_score" / given.csv.stem
    name = "the text" if given.answer == "{}" else f"“{given.answer}”"
    name += f" against “{given.against}”" if given.against else ""
    score_tables.write(out, table, scores, figures, f"score of {name}")
    print(json.dumps(figures | {"out": str(out)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
