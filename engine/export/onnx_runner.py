"""Exported models at work, without torch: features, captions, labels of images.

Needs numpy, pillow, tokenizers and onnxruntime, and ftfy for texts beyond plain ASCII. Images are
paths, encoded bytes or Pillow images; one that cannot be read raises BadSample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.text.tokenizer import load as load_tokenizer
from engine.errors import UserError
from engine.export import one_shot
from engine.export.folder import read_manifest
from engine.export.images import Preprocess
from engine.export.onnx_session import Graph, Reading


class OnnxFolder:
    """What exported folders have in common: graphs, preprocessing, tokenizer.

    Args:
        folder: written by ``--mode=export export.format=onnx``.
        threads: of each operation; default: one a core.
        batch_size: images or texts that are run at a time.
        verify: check every file's SHA-256 first.

    Raises UserError for a folder that is none, or is another task's.
    """

    task = ""

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        batch_size: int = 32,
        verify: bool = False,
    ) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder, verify=verify)
        if self.manifest.get("format") != "onnx" or self.manifest["task"] != self.task:
            held = f"{self.manifest.get('format')} of --task={self.manifest.get('task')}"
            raise UserError(f"{folder} holds {held}, not onnx of --task={self.task}")
        self.batch_size = batch_size
        self.preprocess = Preprocess(self.manifest["image"])
        self.text: dict[str, Any] = self.manifest["text"]
        self.tokenizer = load_tokenizer(folder / self.text["tokenizer"])
        self.graphs = {
            name: Graph(folder, described, threads)
            for name, described in self.manifest["graphs"].items()
        }

    def batches(self, images: Sequence[Any]) -> Iterator[np.ndarray]:
        """Normalised ``image_BCHW``, ``batch_size`` at a time."""
        for start in range(0, len(images), self.batch_size):
            yield self.preprocess(images[start : start + self.batch_size])

    def encode(self, image_BCHW: np.ndarray) -> Any:
        """What the image encoder's graph puts out, as onnxruntime holds it."""
        (found,) = self.graphs["image_encoder"]({"pixel_values": image_BCHW}).values()
        return found


class OnnxClip(OnnxFolder):
    """A dual encoder: L2-normed features of images and texts, whose products are cosines."""

    task = "clip"

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """float32 [N, D]."""
        return self._joined([self.encode(batch).numpy() for batch in self.batches(images)])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D]."""
        found = []
        for start in range(0, len(texts), self.batch_size):
            cleaned = [self.tokenizer.clean(t) for t in texts[start : start + self.batch_size]]
            rows = self.tokenizer.rows(cleaned, self.text["max_length"])
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
            return np.exp(one_shot.log_softmax(logits_NM))
        return 1 / (1 + np.exp(-(logits_NM + np.float32(logits["bias"]))))

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        (output,) = self.manifest["graphs"]["image_encoder"]["outputs"].values()
        return np.concatenate(parts) if parts else np.zeros((0, output["shape"][1]), np.float32)


class OnnxCaptioner(OnnxFolder):
    """Captions by the likeliest token at each step."""

    task = "caption"

    def __call__(
        self, images: Sequence[Any], *, prompt: str | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """A caption for each image; ``prompt`` replaces the run's own, its template included."""
        found: list[str] = []
        for image_BCHW in self.batches(images):
            found += self.captions(image_BCHW, prompt=prompt, max_new_tokens=max_new_tokens)
        return found

    def captions(
        self,
        image_BCHW: np.ndarray,
        *,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Captions of one batch of normalised images."""
        rows = self.greedy(image_BCHW, prompt=prompt, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(row) for row in rows.tolist()]

    def greedy(
        self,
        image_BCHW: np.ndarray,
        *,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
    ) -> np.ndarray:
        """Tokens behind the prompt, int64 [B, T]; behind a text's end there is padding."""
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
        ids_BT = np.tile(np.array(prompt_ids, np.int64), (len(image_BCHW), 1))
        logits, reading = Reading.begin(
            self.graphs["decoder"], self.encode(image_BCHW), ids_BT,
            attention_mask=np.ones_like(ids_BT),
        )  # fmt: skip
        said, going_B = [], np.ones(len(ids_BT), bool)
        while True:
            token_B = np.where(going_B, logits[:, -1].argmax(-1), text["pad_id"])
            said.append(token_B)
            going_B = going_B & (token_B != text["end_id"])
            if len(said) == room or not going_B.any():
                return np.stack(said, axis=1)
            seen_B1 = np.ones_like(token_B[:, None])
            logits, reading = reading.go_on(token_B[:, None], attention_mask=seen_B1)


@dataclass(frozen=True, slots=True)
class Label:
    """What is in an image, and its probability: of all token sequences that spell it."""

    text: str
    prob: float


class OnnxRecognizer(OnnxFolder):
    """Labels of images with their probabilities, by one-shot sampling."""

    task = "recognize"

    def __call__(
        self, images: Sequence[Any], top_k: int | None = None, **options: int
    ) -> list[list[Label]]:
        """``top_k`` labels of each image, the likeliest first; ``options`` as for ``labels``."""
        found: list[list[Label]] = []
        for image_BCHW in self.batches(images):
            found += self.labels(image_BCHW, top_k, **options)
        return found

    def labels(
        self,
        image_BCHW: np.ndarray,
        top_k: int | None = None,
        *,
        first_tokens: int | None = None,
        rows: int = 64,
    ) -> list[list[Label]]:
        """Labels of one batch of normalised images.

        ``first_tokens`` labels are begun (default: the run's own, or ``top_k`` if that is more),
        ``rows`` of them at a time.
        """
        text, told = self.text, self.manifest["labels"]
        top_k = told["num_labels"] if top_k is None else top_k
        num_first = first_tokens or max(told.get("first_tokens") or 0, top_k)
        ids_BT = np.tile(np.array(text["prompt_ids"], np.int64), (len(image_BCHW), 1))
        position_BT = np.tile(np.arange(ids_BT.shape[1]), (len(ids_BT), 1))
        logits, reading = Reading.begin(
            self.graphs["decoder"], self.encode(image_BCHW), ids_BT,
            segment_ids=np.zeros_like(ids_BT), position_ids=position_BT,
        )  # fmt: skip
        most = logits.shape[2] - 1  # the separator begins none
        if num_first > most:
            raise UserError(
                f"{num_first} labels are to be begun, and only {most} tokens can begin one; take "
                "a smaller top_k or first_tokens"
            )
        found = one_shot.one_shot(
            logits[:, -1], reading, prompt_length=ids_BT.shape[1],
            separator_id=text["separator_id"], num_first=num_first, room=told["room"], rows=rows,
        )  # fmt: skip
        return [self._ranked(labels)[:top_k] for labels in found]

    def _ranked(self, found: Sequence[one_shot.Found]) -> list[Label]:
        """Labels as texts, the probabilities of equal ones summed, the likeliest first."""
        probs: dict[str, float] = {}
        for label in sorted(found, key=lambda one: -one.log_p):
            if spelled := self.tokenizer.decode(list(label.ids)):
                probs[spelled] = probs.get(spelled, 0.0) + exp(label.log_p)
        return sorted((Label(*pair) for pair in probs.items()), key=lambda label: -label.prob)


_TASKS: dict[str, Callable[..., OnnxFolder]] = {
    one.task: one for one in (OnnxClip, OnnxCaptioner, OnnxRecognizer)
}


def open_folder(folder: str | Path, **options: Any) -> Any:
    """The folder's model: an ``OnnxClip``, ``OnnxCaptioner`` or ``OnnxRecognizer``. UserError."""
    task = read_manifest(Path(folder)).get("task")
    if task not in _TASKS:
        raise UserError(f"{folder} holds --task={task}; known are {', '.join(_TASKS)}")
    return _TASKS[task](folder, **options)
