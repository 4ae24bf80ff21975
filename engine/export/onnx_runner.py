"""Exported models at work, without torch: features, captions, labels of images.

Needs numpy, pillow, tokenizers and onnxruntime, and ftfy for texts beyond plain ASCII. Images are
paths, encoded bytes or Pillow images; one that cannot be read raises BadSample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.text.tokenizer import clean
from engine.data.text.tokenizer import load as load_tokenizer
from engine.errors import UserError
from engine.export.folder import read_manifest
from engine.export.images import Preprocess

# --- graphs, run by onnxruntime

Value = Any  # onnxruntime's OrtValue: memory of its own, which is passed on without a copy


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


class KVState:
    """What a decoder has read of images and texts; extending it gives another one."""

    def __init__(self, graph: Graph, past: dict[str, Value], texts: dict[str, np.ndarray]) -> None:
        self._graph, self._past, self._texts = graph, past, texts

    @classmethod
    def encode_prompt(
        cls, graph: Graph, image_tokens: Value, ids_BT: np.ndarray, **texts_BT: np.ndarray
    ) -> tuple[np.ndarray, KVState]:
        """Read images and prompts; ``texts_BT`` are the graph's other inputs for these tokens."""
        names = [name for name in graph.inputs if name.startswith("past.")]
        past = {name: graph.nothing(name, len(ids_BT)) for name in names}
        nothing = {name: values[:, :0] for name, values in texts_BT.items()}
        return cls(graph, past, nothing)._read(image_tokens, ids_BT, texts_BT)

    def extend(self, ids_BT: np.ndarray, **texts_BT: np.ndarray) -> tuple[np.ndarray, KVState]:
        """Logits [B, T, V] of further tokens, and the state with them."""
        nothing = self._graph.nothing("image_tokens", len(ids_BT))
        return self._read(nothing, ids_BT, texts_BT)

    def _read(
        self, image_tokens: Value, ids_BT: np.ndarray, texts_BT: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, KVState]:
        texts = {
            name: np.concatenate([known, texts_BT[name]], axis=1, dtype=np.int64)
            for name, known in self._texts.items()
        }
        found = self._graph(
            {"input_ids": ids_BT, "image_tokens": image_tokens, **texts, **self._past}
        )
        logits_BTV: np.ndarray = found.pop("logits").numpy()
        past = {name.replace("present.", "past."): value for name, value in found.items()}
        return logits_BTV, KVState(self._graph, past, texts)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- folders


class OnnxFolder:
    """What exported folders have in common: graphs, preprocessing, tokenizer.

    Args:
        folder: written by ``--mode=export export.format=onnx``.
        threads: of each operation; default: one a core.
        batch_size: images or texts that are run at a time.
        verify: check every file's SHA-256 first.

    Raises UserError for a folder that is not an export, or is another task's.
    """

    task = ""

    def __init__(
        self, folder: str | Path, *,
        threads: int | None = None, batch_size: int = 32, verify: bool = False,
    ) -> None:  # fmt: skip
        folder = Path(folder)
        self.manifest = read_manifest(folder, verify=verify)
        held = f"{self.manifest.get('format')} of --task={self.manifest.get('task')}"
        if held != f"onnx of --task={self.task}":
            raise UserError(f"{folder} holds {held}, not onnx of --task={self.task}")
        self.batch_size = batch_size
        self.preprocess = Preprocess(self.manifest["image"])
        self.text: dict[str, Any] = self.manifest["text"]
        self.tokenizer = load_tokenizer(folder / self.text["tokenizer"])
        self.graphs = {
            name: Graph(folder, described, threads)
            for name, described in self.manifest["graphs"].items()
        }

    def batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Items, ``batch_size`` at a time."""
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def encode(self, image_BCHW: np.ndarray) -> Any:
        """What the image encoder's graph puts out, as onnxruntime holds it."""
        (found,) = self.graphs["image_encoder"]({"pixel_values": image_BCHW}).values()
        return found

    def encode_prompt(
        self, image_BCHW: np.ndarray, prompt_ids: list[int], **texts_P: np.ndarray
    ) -> tuple[np.ndarray, KVState]:
        """Logits and state of images behind one prompt, and the decoder's other inputs for it."""
        rows, image = len(image_BCHW), self.encode(image_BCHW)
        texts_BP = {name: np.tile(each, (rows, 1)) for name, each in texts_P.items()}
        ids_BP = np.tile(np.array(prompt_ids, np.int64), (rows, 1))
        return KVState.encode_prompt(self.graphs["decoder"], image, ids_BP, **texts_BP)


class OnnxClip(OnnxFolder):
    """A dual encoder: L2-normed features of images and texts, whose products are cosines."""

    task = "clip"

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """float32 [N, D]."""
        found = [self.encode(self.preprocess(batch)).numpy() for batch in self.batches(images)]
        return self._joined(found)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]."""
        found = []
        for batch in self.batches(texts):
            rows = self.tokenizer.rows([clean(text) for text in batch], self.text["max_length"])
            ids_BT, mask_BT = (np.array(each, np.int64) for each in rows)
            graph = self.graphs["text_encoder"]
            (features,) = graph({"input_ids": ids_BT, "attention_mask": mask_BT}).values()
            found.append(features.numpy())
        return self._joined(found)

    def probabilities(self, image_ND: np.ndarray, text_MD: np.ndarray) -> np.ndarray:
        """Which text an image goes with, [N, M]: rows sum to 1; of a sigmoid's model each text is
        judged alone."""
        logits = self.manifest["logits"]
        logits_NM = image_ND @ text_MD.T * np.float32(logits["scale"])
        if logits["bias"] is None:
            return np.exp(log_softmax(logits_NM))
        return 1 / (1 + np.exp(-(logits_NM + np.float32(logits["bias"]))))

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        (output,) = self.manifest["graphs"]["image_encoder"]["outputs"].values()
        return np.concatenate(parts) if parts else np.zeros((0, output["shape"][1]), np.float32)


class OnnxCaptioner(OnnxFolder):
    """Captions by the likeliest token at each step."""

    task = "caption"

    def __call__(self, images: Sequence[Any], **options: Any) -> list[str]:
        """A caption for each image; ``options`` as for ``greedy``."""
        batches = self.batches(images)
        return [text for b in batches for text in self.captions(self.preprocess(b), **options)]

    def captions(self, image_BCHW: np.ndarray, **options: Any) -> list[str]:
        """Captions of one batch of normalised images."""
        return [self.tokenizer.decode(row) for row in self.greedy(image_BCHW, **options).tolist()]

    def greedy(
        self, image_BCHW: np.ndarray, *,
        prompt: str | None = None, max_new_tokens: int | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Tokens behind the prompt, int64 [B, T]; behind a text's end there is padding.

        ``prompt`` replaces the run's own, its template included.
        """
        text = self.text
        prompt_ids = text["prompt_ids"]
        if prompt is not None:
            prompt_ids = [text["start_id"], *self.tokenizer.raw(prompt)]
        room = text["max_length"] - len(prompt_ids)
        room = room if max_new_tokens is None else min(room, max_new_tokens)
        if room < 1:
            raise UserError(
                f"the prompt takes {len(prompt_ids)} of {text['max_length']} tokens and leaves "
                "none for a caption; shorten it"
            )
        mask_P = np.ones(len(prompt_ids), np.int64)
        logits, state = self.encode_prompt(image_BCHW, prompt_ids, attention_mask=mask_P)
        said, going_B = [], np.ones(len(image_BCHW), bool)
        while True:
            token_B = np.where(going_B, logits[:, -1].argmax(-1), text["pad_id"])
            said.append(token_B)
            going_B = going_B & (token_B != text["end_id"])
            if len(said) == room or not going_B.any():
                return np.stack(said, axis=1)
            seen_B1 = np.ones_like(token_B[:, None])
            logits, state = state.extend(token_B[:, None], attention_mask=seen_B1)


@dataclass(frozen=True, slots=True)
class Label:
    """What is in an image, and its probability: of all token sequences that spell it."""

    text: str
    prob: float


class OnnxRecognizer(OnnxFolder):
    """Labels of images with their probabilities, by one-shot sampling (NXTP, arXiv 2312.02142,
    section 3.4), as ``engine.generate.label_search``.

    The likeliest first tokens behind the prompt begin a label each, which is extended, side by side
    with the others and unseen by them, by its likeliest tokens to the separator. A label's
    probability is the product over its tokens, the separator included; one that has no separator
    within the run's ``room`` is left out.
    """

    task = "recognize"

    def __call__(
        self, images: Sequence[Any], top_k: int | None = None, **options: int
    ) -> list[list[Label]]:
        """``top_k`` labels of each image, the likeliest first; ``options`` as for ``labels``."""
        batches = self.batches(images)
        return [one for b in batches for one in self.labels(self.preprocess(b), top_k, **options)]

    def labels(
        self, image_BCHW: np.ndarray, top_k: int | None = None, *,
        first_tokens: int | None = None, rows: int = 64,
    ) -> list[list[Label]]:  # fmt: skip
        """Labels of one batch of normalised images.

        ``first_tokens`` labels are begun (default: the run's own, or ``top_k`` if that is more),
        ``rows`` of them at a time.
        """
        prompt_ids, known = self.text["prompt_ids"], self.manifest["labels"]
        top_k = known["num_labels"] if top_k is None else top_k
        num_first = first_tokens or max(known.get("first_tokens") or 0, top_k)
        position_P = np.arange(len(prompt_ids))
        logits, state = self.encode_prompt(
            image_BCHW, prompt_ids, segment_ids=np.zeros_like(position_P), position_ids=position_P
        )
        most = logits.shape[2] - 1  # the separator begins none
        if num_first > most:
            raise UserError(
                f"{num_first} labels are to be begun, and only {most} tokens can begin one; take "
                "a smaller top_k or first_tokens"
            )
        first_BV = log_softmax(logits[:, -1])
        first_BV[:, self.text["separator_id"]] = -np.inf
        ids_BK = np.argsort(-first_BV, axis=1, kind="stable")[:, :num_first]
        log_p_BK = np.take_along_axis(first_BV, ids_BK, axis=1)
        found: list[list[tuple[list[int], float]]] = [[] for _ in ids_BK]
        for start in range(0, num_first, rows):
            part = slice(start, start + rows)
            complete = self._finish(state, ids_BK[:, part], log_p_BK[:, part], known["room"])
            for labels, more in zip(found, complete, strict=True):
                labels += more
        return [self._ranked(labels)[:top_k] for labels in found]

    def _finish(
        self, state: KVState, first_BK: np.ndarray, log_p_BK: np.ndarray, room: int
    ) -> list[list[tuple[list[int], float]]]:
        """Each image's labels from their first tokens on: tokens without separator, and log p."""
        separator_id, num_labels = self.text["separator_id"], first_BK.shape[1]
        ids_BKT = np.full((*first_BK.shape, room), separator_id)
        ids_BKT[..., 0] = first_BK
        log_p_BK = log_p_BK.copy()
        active_BA = np.broadcast_to(np.arange(num_labels), first_BK.shape)
        ended_BK = np.zeros(first_BK.shape, bool)
        for step in range(1, room):
            last_BA = np.take_along_axis(ids_BKT[..., step - 1], active_BA, axis=1)
            position_BA = np.full_like(last_BA, len(self.text["prompt_ids"]) + step - 1)
            logits_BAV, state = state.extend(
                last_BA, segment_ids=active_BA + 1, position_ids=position_BA
            )
            next_BAV = log_softmax(logits_BAV)
            going_BA = ~np.take_along_axis(ended_BK, active_BA, axis=1)
            token_BA = np.where(going_BA, next_BAV.argmax(-1), separator_id)
            log_p_BA = np.take_along_axis(log_p_BK, active_BA, axis=1)
            log_p_BA += np.where(going_BA, next_BAV.max(-1), 0)
            np.put_along_axis(ids_BKT[..., step], active_BA, token_BA, axis=1)
            np.put_along_axis(log_p_BK, active_BA, log_p_BA, axis=1)
            np.put_along_axis(ended_BK, active_BA, token_BA == separator_id, axis=1)
            num_active = int((~ended_BK).sum(1).max())
            if num_active == 0:
                break
            # as many columns as the image with most needs, unfinished labels first
            active_BA = np.argsort(ended_BK, axis=1, kind="stable")[:, :num_active]
        return [
            [
                (ids[: ids.index(separator_id)], log_p)
                for ids, log_p, ended in zip(*rows, strict=True)
                if ended
            ]
            for rows in zip(ids_BKT.tolist(), log_p_BK.tolist(), ended_BK.tolist(), strict=True)
        ]

    def _ranked(self, found: Sequence[tuple[list[int], float]]) -> list[Label]:
        """Labels as texts, the probabilities of equal ones summed, the likeliest first."""
        probs: dict[str, float] = {}
        for ids, log_p in sorted(found, key=lambda one: -one[1]):
            if spelled := self.tokenizer.decode(ids):
                probs[spelled] = probs.get(spelled, 0.0) + exp(log_p)
        return sorted((Label(*pair) for pair in probs.items()), key=lambda label: -label.prob)


_TASKS = {one.task: one for one in (OnnxClip, OnnxCaptioner, OnnxRecognizer)}


def open_folder(folder: str | Path, **options: Any) -> OnnxFolder:
    """The folder's model: an ``OnnxClip``, ``OnnxCaptioner`` or ``OnnxRecognizer``. UserError."""
    task = read_manifest(Path(folder)).get("task")
    if task not in _TASKS:
        raise UserError(f"{folder} holds --task={task}; known are {', '.join(_TASKS)}")
    return _TASKS[task](folder, **options)
