"""The one loop in which a model runs over a dataset: features, captions, answers, labels.

Each rank reads its share of the rows, a batch at a time; what comes of them is gathered, so that
every rank has all of it, in the order of rows. Rows that cannot be read are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.bad_samples import BadRecord
from engine.data.loader import Collate, Transform, rank_slice, valid_batches
from engine.data.reader import Limits
from engine.dist import collectives
from engine.models.towers import modes_restored
from engine.run import Run
from engine.types import Batch, Sample, Source, Task

S = TypeVar("S", bound=Sequence[Any])
T = TypeVar("T")


@dataclass
class Encoded:
    """Every rank's images, in the order of the rows asked for, without those that are bad."""

    features: Tensor  # [N, D] fp32, on the predictor's device
    rows: np.ndarray  # [N] of the source
    labels: Tensor  # [N] -1 where there is none; on the CPU
    bad: list[BadRecord]


@dataclass
class Predictor:
    """A model with all that it takes to run it over a dataset; the same on every rank.

    ``batch_size`` counts all ranks' samples. The model is put into eval mode for each call, and
    each of its modules back as it was; training's random state stays as it is. ``stopped`` is asked
    after each batch of a rank: no more follow.
    """

    task: Task
    model: nn.Module
    transform: Transform
    device: torch.device
    batch_size: int = 256
    num_workers: int | None = 0
    limits: Limits = Limits()  # noqa: RUF009  frozen
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    stopped: Callable[[], bool] = lambda: False

    @classmethod
    def of_run(
        cls,
        run: Run,
        model: nn.Module,
        task: Task | None = None,
        transform: Transform | None = None,
    ) -> Predictor:
        """A model, by default of the run's own task, run as the run's evaluations are."""
        return cls(
            task or run.task,
            model,
            transform or run.transform("valid"),
            run.device,
            batch_size=run.config.data.batch_size_val,
            num_workers=run.config.data.num_workers,
            limits=run.limits,
            autocast=run.precision.autocast,
        )

    def predict(
        self,
        source: Source,
        rows: np.ndarray,
        step: Callable[[Batch], Sequence[T]],
        *,
        collate: Collate,
        batch_size: int,
        limits: Limits | None = None,
    ) -> tuple[dict[int, T], list[BadRecord]]:
        """Row → what ``step`` gives of it, on every rank alike; and the rows that are bad.

        ``step`` takes a batch of ``collate`` on the device, whose ``index_B`` are its rows, and
        gives a JSON value for each of them.
        """
        found: list[tuple[int, T]] = []

        def one(batch: Batch) -> None:
            found.extend(zip(batch["index_B"].tolist(), step(batch), strict=True))

        bad = self._run(source, rows, one, collate, batch_size, limits or self.limits)
        gathered = collectives.all_gather_json(found)
        every = {row: value for part in gathered for row, value in part}
        return dict(sorted(every.items())), bad

    def images(self, source: Source, rows: np.ndarray) -> Encoded:
        """Features of the images of ``rows``."""
        features: list[Tensor] = []
        numbers: list[Tensor] = [torch.empty(2, 0, dtype=torch.int64, device=self.device)]

        def one(batch: Batch) -> None:
            numbers.append(torch.stack([batch["index_B"], batch["label_B"]]))
            features.append(self.task.encode(self.model, batch, "image").float())

        bad = self._run(source, rows, one, self.task.batch, self.batch_size, self.limits)
        index_N, label_N = (gather_numbers(x_N, self.device) for x_N in torch.cat(numbers, dim=1))
        return Encoded(self._gather(features), index_N.numpy(), label_N, bad)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of this rank's texts and all other ranks', in rank order."""
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = -(-self.batch_size // collectives.world())
        found = []
        with evaluating(self.model), torch.no_grad():
            for start in range(0, len(order), size):
                batch = self.task.tokenize([texts[i] for i in order[start : start + size]])
                with self.autocast():
                    found.append(self.task.encode(self.model, self._moved(batch), "text").float())
        if found:
            back = torch.tensor(order, dtype=torch.int64).argsort()
            found = [torch.cat(found)[back.to(self.device)]]
        return self._gather(found)

    def _run(
        self,
        source: Source,
        rows: np.ndarray,
        step: Callable[[Batch], None],
        collate: Collate,
        batch_size: int,
        limits: Limits,
    ) -> list[BadRecord]:
        """``step`` with each batch of this rank's share of ``rows``; all ranks' bad rows."""
        bad: list[BadRecord] = []
        on_gpu = self.device.type == "cuda"
        batches = valid_batches(
            source,
            rows,
            self.transform,
            _WithRows(collate),
            batch_size=batch_size,
            rank=collectives.rank(),
            world=collectives.world(),
            num_workers=self.num_workers,
            pin=on_gpu,
            limits=limits,
        )
        devices = [self.device] if on_gpu else []
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng(devices):
            for _, batch, bad_here in batches:
                bad += bad_here
                if batch:
                    with self.autocast():
                        step(self._moved(batch))
                if self.stopped():
                    break
        return gather_bad(bad)

    def _moved(self, batch: Batch) -> Batch:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _gather(self, parts: list[Tensor]) -> Tensor:
        """All ranks' features; a rank that has none learns their width from the others."""
        width = max(collectives.all_gather_json(parts[0].shape[1] if parts else 0))
        mine = torch.cat(parts) if parts else torch.empty(0, width, device=self.device)
        return collectives.all_gather_rows(mine, collectives.row_counts(len(mine)))


def share(items: S) -> S:
    """This rank's share of what all ranks have."""
    return rank_slice(items, collectives.rank(), collectives.world())


def gather_numbers(mine_N: Tensor, device: torch.device) -> Tensor:
    """int64 numbers of all ranks in rank order, on the CPU; they travel over ``device``."""
    counts = collectives.row_counts(len(mine_N))
    return collectives.all_gather_rows(mine_N.to(device), counts).cpu()


def gather_bad(mine: Sequence[BadRecord]) -> list[BadRecord]:
    """The bad rows of all ranks in rank order."""
    gathered = collectives.all_gather_json([record.to_json() for record in mine])
    return [BadRecord(**record) for records in gathered for record in records]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; then each module's own mode again (frozen parts stay in eval)."""
    with modes_restored(model):
        model.eval()
        yield


class _WithRows:
    """The task's collate, with each sample's row and label beside it."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Batch:
        labels = [-1 if sample.row.label is None else sample.row.label for sample in samples]
        return self.collate(samples) | {
            "index_B": torch.tensor([sample.index for sample in samples]),
            "label_B": torch.tensor(labels),
        }
