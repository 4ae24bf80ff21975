"""Features of images and texts for evaluations: each once, on as many ranks as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config.schema import Transforms
from engine.data.bad_samples import BadRecord
from engine.data.loader import Transform, valid_batches
from engine.data.reader import Limits
from engine.data.share import rank_slice
from engine.data.transforms import pipeline
from engine.dist import collectives
from engine.types import Batch, Sample, Source, Task


@dataclass
class Encoded:
    """Every rank's images, in the order of the rows asked for, without those that are bad."""

    features: Tensor  # [N, D] fp32, on the encoder's device
    rows: np.ndarray  # [N] of the source
    labels: Tensor  # [N] -1 where there is none; on the CPU
    bad: list[BadRecord]


@dataclass
class Encoder:
    """A model with all that it takes to run it over a dataset; the same on every rank.

    ``batch_size`` counts all ranks' samples. Features come out in fp32 and on every rank. The model
    is put into eval mode for the call, and each of its modules back as it was.
    """

    task: Task
    model: nn.Module
    transform: Transform
    device: torch.device
    batch_size: int = 256
    num_workers: int | None = 0
    limits: Limits = Limits()  # noqa: RUF009  frozen
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def images(
        self,
        source: Source,
        rows: np.ndarray,
        *,
        encode: Callable[[Any, Batch], Tensor] | None = None,
    ) -> Encoded:
        """Features of the images of ``rows``; ``encode`` instead of the task's, where given."""
        world = collectives.world()
        batches = valid_batches(
            source,
            rows,
            self.transform,
            _WithRows(self.task.batch),
            batch_size=self.batch_size,
            rank=collectives.rank(),
            world=world,
            num_workers=self.num_workers,
            pin=self.device.type == "cuda",
            limits=self.limits,
        )
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        bad: list[BadRecord] = []
        encode = encode or (lambda model, batch: self.task.encode(model, batch, "image"))
        last: Batch = {}
        with evaluating(self.model):
            for _, batch, bad_here in batches:
                bad += bad_here
                if batch:
                    last = batch
                    feature_BD = self._run(encode, batch)
                    found.append((feature_BD, batch["index_B"], batch["label_B"]))
            # A sharded model's forward is a collective: every rank must run it equally often.
            longest = len(rank_slice(rows, 0, world))
            for _ in range(len(found), self._rounds(longest) if last else 0):
                self._run(encode, last)
        columns = zip(*found, strict=True) if found else ([], [], [])
        features, indices, labels = (list(column) for column in columns)
        index_N = self._gather_numbers(indices)
        return Encoded(
            features=self._gather(features),
            rows=index_N.numpy(),
            labels=self._gather_numbers(labels),
            bad=[
                BadRecord(**record)
                for records in collectives.all_gather_json([record.to_json() for record in bad])
                for record in records
            ],
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of this rank's texts and all other ranks', in rank order."""
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rounds = self._rounds(max(collectives.row_counts(len(texts))))
        size = self._local_batch_size()
        found = []
        with evaluating(self.model):
            for start in range(0, rounds * size, size):
                chosen = [texts[i] for i in order[start : start + size]]
                feature_BD = self._run(
                    lambda model, batch: self.task.encode(model, batch, "text"),
                    self.task.tokenize(chosen or [""]),  # a rank that is done keeps step
                )
                if chosen:
                    found.append(feature_BD)
        if found:
            back = torch.empty(len(order), dtype=torch.int64)
            back[torch.tensor(order)] = torch.arange(len(order))
            found = [torch.cat(found)[back.to(self.device)]]
        return self._gather(found)

    def _run(self, encode: Callable[[Any, Batch], Tensor], batch: Batch) -> Tensor:
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        with torch.no_grad(), self.autocast():
            return encode(self.model, moved).float()

    def _local_batch_size(self) -> int:
        return -(-self.batch_size // collectives.world())

    def _rounds(self, num_rows: int) -> int:
        return -(-num_rows // self._local_batch_size())

    def _gather(self, parts: list[Tensor]) -> Tensor:
        """All ranks' features; a rank that has none learns their width from the others."""
        width = max(collectives.all_gather_json(parts[0].shape[1] if parts else 0))
        mine = torch.cat(parts) if parts else torch.empty(0, width, device=self.device)
        return collectives.all_gather_rows(mine, collectives.row_counts(len(mine)))

    def _gather_numbers(self, parts: list[Tensor]) -> Tensor:
        """All ranks' whole numbers, on the CPU."""
        mine = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return gather_numbers(mine, self.device)


def gather_numbers(mine_N: Tensor, device: torch.device) -> Tensor:
    """int64 numbers of all ranks in rank order, on the CPU; they travel over ``device``."""
    counts = collectives.row_counts(len(mine_N))
    return collectives.all_gather_rows(mine_N.to(device), counts).cpu()


def check_size(model: nn.Module, transforms: Transforms) -> None:
    """Raises UserError where images of evaluations have a size that the image encoder cannot take.

    One of training's size it takes: nothing is run where both are the same.
    """
    train, valid = (
        pipeline.output_size(names, transforms)
        for names in (transforms.train_transforms, transforms.valid_transforms)
    )
    tower = getattr(model, "image_encoder", None)
    if tower is not None and train != valid:
        weight = next(tower.parameters())
        with torch.no_grad(), evaluating(tower):
            tower(torch.zeros(1, 3, *valid, device=weight.device, dtype=weight.dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; then each module's own mode again (frozen parts stay in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _WithRows:
    """The task's collate, with each sample's row and label beside it."""

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = self.collate(samples)
        batch["index_B"] = torch.tensor([sample.index for sample in samples])
        labels = [-1 if sample.row.label is None else sample.row.label for sample in samples]
        batch["label_B"] = torch.tensor(labels)
        return batch
