"""What the formats of Arrow and Parquet tables let one say about columns and images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from engine.config.schema import Section

Column = Literal[
    "image", "image_id", "caption", "caption_id", "question", "answers", "labels", "label",
    "conversations", "instruction", "inputs", "outputs", "question_type", "answer_type",
]  # fmt: skip


class TableOptions(Section):
    """Options of every table; files and folders are relative to ``root``."""

    root: Path  # relative to data.data_path; default: the dataset's name
    images: str = "."  # where paths are looked up
    columns: dict[Column, str] = Field(default={})  # the table's own names, where unusual
    base64: bool | None = None  # text in the image column; default: by the column's name
    several_images: Literal["first", "all", "refuse"] = "first"  # of a cell with more than one
