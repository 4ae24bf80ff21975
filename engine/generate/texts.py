"""Texts about images, by transformers' ``generate``: greedy, beams, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError
from engine.generate import draws
from engine.models.vision_language import VisionLanguage
from engine.types import Batch


class SpeakingTask(Protocol):
    """What generation asks of a task."""

    tokenizer: TextTokenizer
    eos_id: int
    max_length: int

    def prompts(self, instructions: list[str]) -> tuple[Tensor, Tensor]: ...

    def room(self, ids_BP: Tensor) -> int: ...


def num_texts(section: Generate) -> int:
    """Texts that are generated for each image."""
    return section.num_samples if section.method == "best_of_n" else 1


def options(section: Generate, room: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The keywords of transformers' ``generate``; ``room`` bounds the new tokens.

    Temperature, top-k and top-p are not among them: ``draws.processors`` apply them before a draw.
    """
    limit = min(section.max_new_tokens or room, room)
    chosen: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": min(section.min_new_tokens, limit),
        "repetition_penalty": section.repetition_penalty,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "do_sample": section.method in ("sample", "best_of_n"),
        "num_beams": section.num_beams if section.method == "beam" else 1,
        "synced_gpus": False,  # weights are whole, and ranks may have texts of different numbers
    }
    if chosen["do_sample"]:
        chosen |= {
            "top_k": 0,
            "top_p": 1.0,
            "temperature": 1.0,
            "num_return_sequences": num_texts(section),
        }
    elif section.method == "beam":
        chosen |= {"length_penalty": section.length_penalty}
    return chosen


@torch.no_grad()
def generate_texts(
    task: SpeakingTask,
    model: VisionLanguage,
    image_BCHW: Tensor,
    instructions: list[str],
    section: Generate,
    *,
    rows: Sequence[int] | None = None,
) -> list[list[str]]:
    """``num_texts(section)`` texts for each image.

    Drawn ones hang on ``section.seed`` and the image's number in ``rows`` (by default its place).
    """
    ids_BP, mask_BP = (x.to(image_BCHW.device) for x in task.prompts(instructions))
    image_BND = model.image_tokens(image_BCHW)
    numbers = range(len(ids_BP)) if rows is None else rows
    return _speak(task, model, Asked(image_BND, ids_BP, mask_BP, None), section, numbers)


@torch.no_grad()
def generate_batch(
    task: SpeakingTask, model: VisionLanguage, batch: Batch, section: Generate
) -> list[list[str]]:
    """``num_texts(section)`` texts for each row of a batch of prompts, as ``VqaTask.prompt_batch``.

    Drawn ones hang on ``section.seed`` and the row's ``index_B``. Where the model goes on with the
    prompt, the longest one of the batch bounds the new tokens.
    """
    image_MND, num_images_B = model.batch_tokens(batch)
    asked = Asked(image_MND, batch["input_ids_BT"], batch["attention_mask_BT"], num_images_B)
    return _speak(task, model, asked, section, batch["index_B"].tolist())


class Asked(NamedTuple):
    """Prompts and their images, as decoders take them."""

    image_MND: Tensor
    ids_BP: Tensor
    mask_BP: Tensor
    num_images_B: Tensor | None


def _speak(
    task: SpeakingTask,
    model: VisionLanguage,
    asked: Asked,
    section: Generate,
    numbers: Sequence[int],
) -> list[list[str]]:
    room = task.room(asked.ids_BP)
    if room < 1:
        raise UserError(
            f"the prompt takes {asked.ids_BP.shape[1]} of {task.max_length} tokens and leaves none "
            "for a text; shorten it or raise model.decoder.max_length",
            key="model.decoder.max_length",
        )
    keywords = options(section, room, task.eos_id, task.tokenizer.pad_id)
    each = num_texts(section)
    if keywords["do_sample"]:
        uniform_BT = draws.uniforms(section.seed, numbers, each, keywords["max_new_tokens"])
        keywords["logits_processor"] = draws.processors(
            uniform_BT.to(asked.ids_BP.device),
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
        )
    found = model.decoder.generate(*asked, **keywords).tolist()
    texts = [task.tokenizer.decode(ids) for ids in found]
    return [texts[start : start + each] for start in range(0, len(texts), each)]
