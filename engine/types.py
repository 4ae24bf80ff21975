"""What the parts of a run hand to one another.

Shape legend, used as a suffix of tensor names wherever a shape is not plain:
``B`` batch (this rank's samples), ``G`` global batch (all ranks'), ``C`` channels, ``H`` height,
``W`` width, ``T`` tokens, ``D`` embedding width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor, nn

Batch = dict[str, Any]
"""A collated batch: tensors of the same first dimension, and plain scalars (``step``)."""

Turn = tuple[str, str]
"""One turn of a conversation: who speaks (``human`` or ``gpt``), and the text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source, before its image is decoded."""

    key: str  # names the sample in messages: a file name, a tar member
    image: Path | bytes | None  # a file inside the source's root, or its encoded bytes
    caption: str  # of a conversation the first answer, of a question it and its answer
    image_id: str
    caption_id: str
    label: int | None = None
    turns: tuple[Turn, ...] = ()  # the conversation; of a question, it and its answer
    answers: tuple[str, ...] = ()  # every annotator's
    labels: tuple[str, ...] = ()  # names of what is in the image
    more_images: tuple[Path | bytes, ...] = ()  # the second and all further ones
    question_type: str = ""  # what the question asks for, as the dataset names it
    answer_type: str = ""  # what it is answered by: VQA's yes/no, number and other


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded sample, ready for a task's collate."""

    image: Tensor | None  # uint8 CHW
    text: str
    image_id: str
    caption_id: str
    dataset: int  # position in train_name / valid_name
    index: int  # row in that dataset
    label: int | None = None
    seed: int | None = None  # of this sample's augmentation in this epoch; None: none (evaluation)
    turns: tuple[Turn, ...] = ()
    answers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    more_images: tuple[Tensor, ...] = ()  # each as ``image``
    question_type: str = ""
    answer_type: str = ""


class BadSample(Exception):
    """A sample that cannot be used: ``cause`` is one word or two for counting, ``detail`` the rest.

    Causes: missing, empty file, not an image, truncated, corrupt, too large, no caption, no image,
    outside root, unreadable, malformed, no answer, not text, caption too long, prompt too long,
    several images, too many images.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class Source(Protocol):
    """Map-style rows of one dataset split. Rows live outside the Python heap."""

    name: str
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The row at ``index``; raises BadSample where the row itself cannot be used."""
        ...

    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id`` of all rows, equal where the ids are; or
        int32 ``length``: characters of a row's texts, negative where it has no image; or int32
        ``answer_length``: how many of them are its last answer's, or its caption's."""
        ...

    def captions(self) -> Iterator[str]:
        """All captions in order, without their images."""
        ...


@dataclass(slots=True)
class Features:
    """What a task's forward hands to its losses.

    ``per_sample`` tensors have the batch first and may be concatenated over sub-batches; ``shared``
    are differentiable scalars of the model (``logit_scale``, ``logit_bias``); ``info`` holds plain
    values that are the same for the whole step and every rank (the mixup coefficient, say).
    """

    per_sample: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mix:
    """One step's mixup, the same on every rank and sub-batch: what is mixed, how much, with whom.

    The partner of row i of n rows is row n-1-i (``reversed``), or comes from a permutation drawn
    from ``seed`` (``random``).
    """

    lam: float
    image: bool
    text: bool
    partner: str = "reversed"
    seed: int = 0


class Task(Protocol):
    """A task is four short methods; steps, loop and evaluations know it by these alone.

    ``rows_interact``: a row's features hang on the other rows of its sub-batch (mixup), so that a
    step may not put the rows into another order.
    """

    rows_interact: bool

    def build_model(self) -> nn.Module: ...

    def batch(self, samples: list[Sample]) -> Batch: ...

    def features(self, model: Callable[..., Any], batch: Batch) -> Features: ...

    def losses(self, features: Features) -> dict[str, Tensor]: ...


Metrics = Mapping[str, float | str]
