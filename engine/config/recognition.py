"""The sections of object recognition: what labels are, how they are written and scored."""

# ruff: noqa: RUF012 - pydantic copies a default for each section that is made
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from engine.config.section import Names, NonNegativeInt, Section


class Labels(Section):
    """What there is to recognise in an image, and the text that it is learned as.

    A row reads ``PROMPT label, label,``. The drawn prompts and the words left out are those of NXTP
    (arXiv 2312.02142) in kind; one prompt is drawn for each sample and epoch.
    """

    source: Literal["given", "nouns"] = "given"  # of the dataset; or nouns of its captions
    separator: str = ","  # a single token of the decoder's tokenizer
    prompt: str = "The objects in the image are"  # whenever labels are asked for
    train_prompts: Names = [
        "The objects in the image are",
        "The items present in the photograph are",
        "The elements shown in the picture are",
        "The objects visible in the photograph are",
        "The items depicted in the picture are",
        "The elements seen in the image are",
        "The objects captured in the picture are",
        "The items featured in the image are",
        "The elements represented in the photograph are",
        "The objects that appear in the image are",
    ]  # one of them in training; none: the prompt above
    leave_out: Names = [
        "background", "day", "front", "illustration", "image", "ounce", "person", "photography",
        "stock",
    ]  # whole words that are no objects, of nouns alone  # fmt: skip


class RecognitionEval(Section):
    """How recognised labels are scored."""

    k: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 5, 10]  # labels of an image
    encoder: str | None = None  # of sentences: a hub id, folder, CLIP, or a clip run of ours
    label_set: str | None = None  # for mAP: a file of names, or "dataset": all that its rows have
    num_images: PositiveInt | None = None  # of each validation set; default: all
    num_examples: NonNegativeInt = 8  # in the gallery
