"""Texts about images, by transformers' ``generate``: greedy, beams, sampling."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config.schema import Generate
from engine.data.text.tokenizer import TextTokenizer
from engine.errors import UserError
from engine.models.vision_language import VisionLanguage


class SpeakingTask(Protocol):
    """What generation asks of a task."""

    tokenizer: TextTokenizer
    eos_id: int
    max_length: int

    def prompts(self, instructions: list[str]) -> tuple[Tensor, Tensor]: ...


def check(section: Generate) -> None:
    """Raises UserError for a number of samples that is none."""
    if section.method == "best_of_n" and section.num_samples < 1:
        raise UserError(
            f"best_of_n needs at least one sample, not {section.num_samples}",
            key="generate.num_samples",
        )


def num_texts(section: Generate) -> int:
    """Texts that are generated for each image."""
    return section.num_samples if section.method == "best_of_n" else 1


def options(section: Generate, room: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The keywords of transformers' ``generate``; ``room`` bounds the new tokens."""
    limit = min(section.max_new_tokens or room, room)
    chosen: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": min(section.min_new_tokens, limit),
        "repetition_penalty": section.repetition_penalty,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "do_sample": section.method in ("sample", "best_of_n"),
        "num_beams": section.num_beams if section.method == "beam" else 1,
    }
    if chosen["do_sample"]:
        chosen |= {
            "top_k": section.top_k,
            "top_p": section.top_p,
            "temperature": section.temperature,
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
) -> list[list[str]]:
    """``num_texts(section)`` texts for each image, drawn from torch's global generator."""
    ids_BP, mask_BP = (x.to(image_BCHW.device) for x in task.prompts(instructions))
    room = task.max_length - ids_BP.shape[1]
    if room < 1:
        raise UserError(
            f"the prompt takes {ids_BP.shape[1]} of {task.max_length} tokens and leaves none for "
            "a text; shorten it or raise model.decoder.max_length",
            key="model.decoder.max_length",
        )
    tokens_BND = model.image_tokens(image_BCHW)
    keywords = options(section, room, task.eos_id, task.tokenizer.pad_id)
    found = model.decoder.generate(tokens_BND, ids_BP, mask_BP, **keywords).tolist()
    texts, each = [task.tokenizer.decode(ids) for ids in found], num_texts(section)
    return [texts[start : start + each] for start in range(0, len(texts), each)]
