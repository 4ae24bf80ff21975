"""What the parts of a run hand to one another.

Shape legend, used as a suffix of tensor names wherever a shape is not plain:
``B`` batch (this rank's samples), ``G`` global batch (all ranks'), ``C`` channels, ``H`` height,
``W`` width, ``T`` tokens, ``D`` embedding width, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from engine import registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from engine.config.schema import Config
    from engine.data.text.tokenizer import TextTokenizer

Batch = dict[str, Any]
"""A collated batch: tensors of the same first dimension, and plain scalars (``step``)."""

Turn = tuple[str, str]
"""One turn of a conversation: who speaks (``human`` or ``gpt``), and the text."""


class Place(NamedTuple):
    """Where an image is inside a file of many; ``engine/data/image_files.py`` reads it."""

    file: str
    offset: int
    size: int  # in bytes
    shown: str = ""  # names the image in messages
    base64: bool = False  # the bytes there are base64 text
    state: tuple[int, int] | None = None  # size and time of the file when the place was noted


EncodedImage = Path | Place | bytes
"""An encoded image: a file of its own, inside its source's root; a place in a file; its bytes."""


@dataclass(slots=True)  # not frozen: that would take a tenth of the time to read a row
class Row:
    """One row of a source, its images still encoded. Tables keep it, a column for each field.

    A format that makes rows may leave ``key`` and both ids empty, to be made from the row's place,
    names image files by places without a file, and gives a ``cause`` to those that are
    lost. A source hands out none of these: it raises BadSample for a row with a cause.
    """

    key: str = ""  # names the row in messages: a file name, a tar member
    images: tuple[EncodedImage, ...] = ()
    caption: str = ""  # of a conversation the first answer, of a question it and its answer
    image_id: str = ""
    caption_id: str = ""
    label: int | None = None  # the number of a class
    turns: tuple[Turn, ...] = ()  # the conversation; of a question, it and its answer
    answers: tuple[str, ...] = ()  # every annotator's
    labels: tuple[str, ...] = ()  # names of what is in the image
    question: str | None = None  # of a row that is one question and not a conversation
    cause: str = ""  # why the row cannot be used, as BadSample has it
    detail: str = ""
    # Further texts, which tables keep as they are.
    question_type: str = ""  # what the question asks for, as the dataset names it
    answer_type: str = ""  # what it is answered by: VQA's yes/no, number and other


@dataclass(frozen=True, slots=True)
class Sample:
    """A row with its images decoded, ready for a task's collate."""

    row: Row
    images: tuple[Tensor, ...]  # uint8 CHW each
    dataset: int  # position in train_name / valid_name
    index: int  # of the row in that dataset
    seed: int | None = None  # of this sample's augmentation in this epoch; None: none (evaluation)


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


class Source(ABC):
    """Map-style rows of one dataset split. Rows are stored outside the Python heap."""

    name: str
    split: str
    classes: list[str] | None = None  # names of the labels' numbers
    # Of captions and a reference for each: figures that this dataset has beside the usual ones.
    content_scores: Callable[[Sequence[str], Sequence[str]], dict[str, float]] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """The row at ``index``; raises BadSample where the row itself cannot be used."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """int64 codes of ``image_id`` or ``caption_id`` of all rows, equal where the ids are; or
        int32 ``length``: characters of a row's texts, negative where it has no image; or int32
        ``answer_length``: how many of them are its last answer's, or its caption's."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """All captions in order, without their images; empty where a row has none."""

    def captions_of(self, rows: np.ndarray) -> Iterator[str]:
        """All captions that some rows may show, row after row, without their images."""
        for row in rows.tolist():
            try:
                yield self[row].caption
            except BadSample:
                yield ""

    @property
    def blocks(self) -> np.ndarray | None:
        """Rows of each shard, in the order of rows; None where they are not stored in shards."""
        return None

    @property
    def has_conversations(self) -> bool:
        """Whether any row is a conversation."""
        return False

    def conversations(self) -> Iterator[tuple[Turn, ...]]:
        """The turns of all rows in order, none of those that are not conversations."""
        return repeat((), len(self))

    @property
    def state(self) -> str:
        """Another one where the data that the rows were made of has changed; "" where unknown."""
        return "/".join(source.state for source in self.below)

    @property
    def below(self) -> Sequence[Source]:
        """The sources that this one is a view of."""
        return ()


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


class Task:
    """What a run trains: its model, how samples become batches, and the losses.

    A task's file derives a class from this one and ends with ``build = ThatClass``. Four methods
    make it train: ``build_model``, ``batch``, ``features``, ``losses``. The others have defaults.
    """

    text_part: ClassVar[str | None] = None
    """The section of ``model`` whose tokenizer the task takes: ``text_encoder`` or ``decoder``."""
    trains: ClassVar[bool] = True
    """False: there is no loss, and ``train`` only scores the model."""
    modalities: tuple[str, ...] = ("image",)
    """What the model relates: ``image``, and ``text``, ``caption``, ``answer`` or ``labels``."""
    rows_interact: bool = False
    """Features of a row depend on the other rows of its sub-batch (mixup), so that a step may not
    put the rows into another order."""
    text_alone: bool = False
    """A sample without an image is of use."""
    tokenizer: TextTokenizer | None = None

    def __init__(self, config: Config, tokenizer: TextTokenizer | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def more_texts(cls, config: Config) -> list[str]:
        """What a tokenizer is trained on beside the captions."""
        return []

    def part(self, folder: str, key: str, /, **more: Any) -> Any:
        """What the part that ``key``'s ``name`` names builds from the section at that key."""
        section, options = attrgetter(key)(self.config), self.config.options
        return registry.build(
            folder, section.name, section, key=f"{key}.name", options=options, **more
        )

    # --- training

    def build_model(self) -> nn.Module:
        """The model, on the CPU."""
        raise NotImplementedError

    def batch(self, samples: list[Sample]) -> Batch:
        """Collate; ``dataset_B`` and ``index_B`` say where the samples come from."""
        raise NotImplementedError

    def features(self, model: Callable[..., Any], batch: Batch) -> Features:
        """What the losses are made of, by a forward pass of ``model``."""
        raise NotImplementedError

    def losses(self, features: Features) -> dict[str, Tensor]:
        """``loss``, which is trained on, and any parts of it to be logged.

        The mean over ranks of ``loss``, and of its gradient, is the global batch's.
        """
        raise NotImplementedError

    def usable(self, row: Row) -> None:
        """Raises BadSample for a row that cannot be learned from."""

    def blank(self, batch: Batch) -> Batch | None:
        """The batch with nothing to learn in it, for a rank without a usable sample.

        None: a rank cannot take part without a sample.
        """
        return None

    def describe(self, sample: Sample) -> tuple[str, str] | None:
        """A sample's prompt, and the text that is learned after it; None where there are none."""
        return None

    # --- evaluation and use

    def askable(self, row: Row) -> None:
        """Raises BadSample for a row whose question cannot be answered."""

    def tokenize(self, texts: list[str]) -> Batch:
        """``input_ids_BT`` and ``attention_mask_BT`` of texts to be encoded."""
        raise NotImplementedError

    def encode(self, model: Callable[..., Any], batch: Batch, modality: str) -> Tensor:
        """Features [B, D] of one modality, ``image`` or ``text``."""
        raise NotImplementedError


Metrics = Mapping[str, float | str]
