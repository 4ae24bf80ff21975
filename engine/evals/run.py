"""All evaluations that a configuration asks for, as one table of figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from torch import nn

from engine.data.bad_samples import BadRecord, summary
from engine.data.sources import open_source
from engine.dist import collectives
from engine.errors import UserError
from engine.evals import answers, linear_probe, prompts, retrieval, zero_shot
from engine.evals.encode import Encoder
from engine.evals.gallery import retrieved, spoken
from engine.evals.judges import Judges
from engine.logs.gallery import Example
from engine.run import Run
from engine.types import Metrics, Source

_NUM_EXAMPLES = 8  # images of a retrieval's gallery


class Evaluations:
    """What scores a model of a run; every rank takes part and gets the same figures."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.task = run, run.config, run.task
        self.judges = Judges(run)
        self.galleries: dict[str, list[Example]] = {}  # of the latest call
        self.predictions: dict[str, Sequence[Any]] = {}
        self.pictures: dict[str, Image.Image] = {}  # precision-recall curves

    def warn(self, text: str) -> None:
        """A warning, once for all ranks."""
        if collectives.rank() == 0:
            self.run.warn(text)

    def __call__(self, model: nn.Module) -> Metrics:
        """``DATASET/metric`` → value, in percent; nothing where it was stopped on the way."""
        found: dict[str, float | str] = {}
        self.galleries, self.predictions, self.pictures = {}, {}, {}
        encoder = self.encoder(model)
        for name, evaluation in self._wanted():
            if collectives.any_true(self.run.stop.requested):
                self.galleries, self.predictions = {}, {}
                return {}
            metrics, bad = evaluation(encoder)
            if bad:
                self.warn(f"{name}: {len(bad)} rows left out: {summary(bad)}")
            found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        return found

    def check(self) -> None:
        """Open all that will be evaluated on: a mistake is told before training, not after it."""
        config = self.config
        if {"text", "caption", "answer", "labels"} & set(self.task.modalities):
            for name in config.data.valid_name:
                open_source(name, "valid", config.data, key="data.valid_name")
        if "text" in self.task.modalities:
            for name in config.eval.zero_shot:
                self._classes(name)
        if "caption" in self.task.modalities and config.data.valid_name:
            from engine.evals.captions import same_model
            from engine.metrics.captions import need_scorers

            need_scorers()
            ranker, scorer = self.judge("ranker"), self.judge("scorer")
            if ranker is not None and scorer is not None and same_model(ranker, scorer):
                self.warn("CLIPScore will be by the model that chooses the captions: circular")
        if "answer" in self.task.modalities and config.data.valid_name:
            answers.choices(config.generate)
        if "labels" in self.task.modalities and config.data.valid_name:
            self.judges.of_labels(self.task, config.eval.recognition.k)
        if (probe := config.eval.linear_probe).train:
            self._labelled(probe.train, "train")
            self._labelled(probe.valid or probe.train, "valid")

    def _wanted(self) -> list[tuple[str, Callable[[Encoder], tuple[Metrics, list[BadRecord]]]]]:
        wanted: list[tuple[str, Any]] = []
        if "text" in self.task.modalities:
            sets = self.config.data.valid_name, self.config.eval.zero_shot
            for names, evaluation in zip(sets, (self._retrieval, self._zero_shot), strict=True):
                wanted += [(name, partial(evaluation, name)) for name in names]
        if "caption" in self.task.modalities:
            wanted += [
                (name, partial(self._captions, name)) for name in self.config.data.valid_name
            ]
        if "answer" in self.task.modalities:
            names = self.config.data.valid_name
            wanted += [(name, partial(self._answers, name)) for name in names]
        if "labels" in self.task.modalities:
            names = self.config.data.valid_name
            wanted += [(name, partial(self._recognition, name)) for name in names]
        if self.config.eval.linear_probe.train:
            wanted.append((f"{self.config.eval.linear_probe.train}_probe", self._linear_probe))
        return wanted

    def encoder(self, model: nn.Module) -> Encoder:
        """The model with all that it takes to run it over a validation set."""
        run, data = self.run, self.config.data
        return Encoder(
            run.task,
            model,
            run.transform("valid"),
            run.device,
            batch_size=data.batch_size_val,
            num_workers=data.num_workers,
            limits=run.limits,
            autocast=run.precision.autocast,
        )

    def _num_rows(self) -> int | None:
        data = self.config.data
        return data.valid_steps * data.batch_size_val if data.valid_steps else None

    def _retrieval(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        source = open_source(name, "valid", self.config.data, key="data.valid_name")
        found = retrieval.evaluate(
            encoder,
            source,
            num_rows=self._num_rows(),
            shuffle_words=self.config.eval.shuffle_words,
            seed=self.config.runner.seed,
            num_examples=_NUM_EXAMPLES,
        )
        self.galleries[name] = [
            retrieved(source, row, captions, self.config.data.max_image_pixels)
            for row, captions in found.examples
        ]
        return found.metrics, found.bad

    def _captions(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        from engine.evals import captions  # with its scorers, which other tasks do without

        source = open_source(name, "valid", self.config.data, key="data.valid_name")
        section = self.config.eval.captions
        found = captions.evaluate(
            encoder,
            source,
            self.config.generate,
            instruction=self.config.data.prompt.instruction,
            num_images=section.num_images or self._num_rows(),
            ranker=self.judge("ranker"),
            scorer=self.judge("scorer"),
        )
        self.predictions[name] = found.predictions
        self.galleries[name] = [
            spoken(source, prediction, self.config.data.max_image_pixels)
            for prediction in found.predictions[: section.num_examples]
        ]
        return found.metrics, found.bad

    def _answers(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        from engine.evals import vqa  # with transformers, which other tasks do without

        source = open_source(name, "valid", self.config.data, key="data.valid_name")
        found = vqa.evaluate(encoder, source, self.config.generate, num_rows=self._num_rows())
        self.predictions[name] = found.predictions
        self.galleries[name] = [
            answers.shown(source, answer, self.config.data.max_image_pixels)
            for answer in found.predictions[: self.config.eval.captions.num_examples]
        ]
        return found.metrics, found.bad

    def _recognition(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        from engine.evals import recognised, recognition  # with transformers

        source = open_source(name, "valid", self.config.data, key="data.valid_name")
        section, pixels = self.config.eval.recognition, self.config.data.max_image_pixels
        ranker, embed = self.judges.of_labels(self.task, section.k)
        found = recognition.evaluate(
            encoder,
            source,
            self.config.generate,
            section,
            num_images=section.num_images or self._num_rows(),
            ranker=ranker,
            embed=embed,
        )
        self.predictions[name] = found.predictions
        if found.curve is not None:
            self.pictures[name] = found.curve
        examples = found.predictions[: section.num_examples]
        self.galleries[name] = [recognised.shown(source, one, pixels) for one in examples]
        return found.metrics, found.bad

    def judge(self, role: str) -> Any:
        """The ``ranker`` or ``scorer`` that ``generate`` names; see ``Judges``."""
        return self.judges.contrast(role)

    def _zero_shot(self, name: str, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        found = zero_shot.evaluate(encoder, *self._classes(name), num_rows=self._num_rows())
        return found.metrics, found.bad

    def _classes(self, name: str) -> tuple[Source, prompts.Prompts]:
        """Labelled images, and the prompts of their classes. Raises UserError."""
        chosen, key = self.config.eval.zero_shot[name], f"eval.zero_shot.{name}"
        source = open_source(chosen.dataset, "valid", self.config.data, key=f"{key}.dataset")
        texts = prompts.load(chosen.classes, chosen.templates, dataset=chosen.dataset, key=key)
        texts.in_order_of(source.classes, source.name)
        return source, texts

    def _linear_probe(self, encoder: Encoder) -> tuple[Metrics, list[BadRecord]]:
        from engine.train.lars import LARS

        probe = self.config.eval.linear_probe
        found = linear_probe.evaluate(
            encoder,
            self._labelled(probe.train, "train"),
            self._labelled(probe.valid or probe.train, "valid"),
            probe,
            optimizer=LARS if probe.method == "lars" else None,
            seed=self.config.runner.seed,
        )
        return found.metrics, found.bad

    def _labelled(self, name: str | None, split: Any) -> Source:
        key = f"eval.linear_probe.{split}"
        if name is None:
            raise UserError("name a dataset of labelled images", key=key)
        return open_source(name, split, self.config.data, key=key)
