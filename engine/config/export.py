"""The section of --mode=export: in which form a run's weights leave the engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config.section import Section


class Export(Section):
    format: str = "onnx"  # a file of engine/export: onnx, open_clip, hf
    output: str | None = None  # the folder to write; default: the run's, export/FORMAT
    opset: Annotated[int, Field(ge=18, le=23)] = 20  # of ONNX
    # Weights in files beside their graphs; auto: where they come to 2 GB, too much for one file
    external_data: Literal["auto", "always"] = "auto"
