"""Graphs of an exported folder, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError

Value = Any  # onnxruntime's OrtValue: memory of its own, which is handed on without a copy


class Graph:
    """One graph; ``threads`` is for each of its operations, by default one a core."""

    def __init__(self, folder: Path, described: Mapping[str, Any], threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"running ONNX needs onnxruntime ({error}): pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        self.inputs, self.outputs = described["inputs"], list(described["outputs"])
        self._as_value = onnxruntime.OrtValue.ortvalue_from_numpy
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / described["file"]), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of a dozen kinds, none of them in common
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} cannot run {folder / described['file']}: "
                f"{str(error).splitlines()[0]}; take a newer onnxruntime, or export with a lower "
                "export.opset"
            ) from error

    def __call__(self, given: Mapping[str, np.ndarray | Value]) -> dict[str, Value]:
        """Every output by its name, of every input by its."""
        values = {
            name: self._as_value(np.ascontiguousarray(one)) if isinstance(one, np.ndarray) else one
            for name, one in given.items()
        }
        found = self._session.run_with_ort_values(self.outputs, values)
        return dict(zip(self.outputs, found, strict=True))

    def nothing(self, name: str, rows: int) -> np.ndarray:
        """An input of length 0."""
        described = self.inputs[name]
        shape = [size if isinstance(size, int) else 0 for size in described["shape"]]
        return np.zeros([rows, *shape[1:]], described["dtype"])


class Reading:
    """What a decoder has read of images and texts, to be gone on with; never changed itself."""

    def __init__(self, graph: Graph, past: dict[str, Value], texts: dict[str, np.ndarray]) -> None:
        self._graph, self._past, self._texts = graph, past, texts

    @classmethod
    def begin(
        cls, graph: Graph, image_tokens: Value, ids_BT: np.ndarray, **texts_BT: np.ndarray
    ) -> tuple[np.ndarray, Reading]:
        """Read images and prompts; ``texts_BT`` are the graph's other inputs for these tokens."""
        rows = len(ids_BT)
        past = {
            name: graph.nothing(name, rows) for name in graph.inputs if name.startswith("past.")
        }
        nothing = {name: values[:, :0] for name, values in texts_BT.items()}
        return cls(graph, past, nothing)._read(image_tokens, ids_BT, texts_BT)

    def go_on(self, ids_BT: np.ndarray, **texts_BT: np.ndarray) -> tuple[np.ndarray, Reading]:
        """Logits [B, T, V] of further tokens, and what has been read with them."""
        nothing = self._graph.nothing("image_tokens", len(ids_BT))
        return self._read(nothing, ids_BT, texts_BT)

    def _read(
        self, image_tokens: Value, ids_BT: np.ndarray, texts_BT: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, Reading]:
        texts = {
            name: np.concatenate([known, texts_BT[name]], axis=1, dtype=np.int64)
            for name, known in self._texts.items()
        }
        given = {"input_ids": ids_BT, "image_tokens": image_tokens, **texts, **self._past}
        found = self._graph(given)
        logits_BTV: np.ndarray = found.pop("logits").numpy()
        past = {name.replace("present.", "past."): value for name, value in found.items()}
        return logits_BTV, Reading(self._graph, past, texts)
