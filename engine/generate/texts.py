"""Texts about images, by transformers' ``generate``: greedy, beams, sampling.

Draws depend on the seed and the image, not on which images share a batch. torch's generator serves
a batch row after row, so that other rows, or other processes, would give an image another text.
Here every text has random numbers of its own, one a token, and each finds its token by the inverse
of the cumulated probabilities: a number for a token, not one for each of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine.config.schema import Generate
from engine.data.permutation import hash64
from engine.errors import UserError
from engine.models.vision_language import VisionLanguage
from engine.tasks.caption import CaptionTask
from engine.tasks.vqa import VqaTask
from engine.types import Batch


def _keywords(section: Generate, room: int, task: CaptionTask | VqaTask) -> dict[str, Any]:
    """Those of transformers' ``generate``; ``room`` bounds the new tokens.

    Temperature, top-k and top-p are not among them: ``processors`` apply them before a draw.
    """
    limit = min(section.max_new_tokens or room, room)
    chosen: dict[str, Any] = {
        "max_new_tokens": limit,
        "min_new_tokens": min(section.min_new_tokens, limit),
        "repetition_penalty": section.repetition_penalty,
        "eos_token_id": task.eos_id,
        "pad_token_id": task.tokenizer.pad_id,
        "do_sample": section.method in ("sample", "best_of_n"),
        "num_beams": section.num_beams if section.method == "beam" else 1,
        "synced_gpus": False,  # weights are whole, and ranks may have texts of different numbers
    }
    if section.method == "beam":
        chosen["length_penalty"] = section.length_penalty
    elif chosen["do_sample"]:
        chosen |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    return chosen


def generate_texts(
    task: CaptionTask | VqaTask,
    model: VisionLanguage,
    image_BCHW: Tensor,
    instructions: list[str],
    section: Generate,
    *,
    rows: Sequence[int] | None = None,
) -> list[list[str]]:
    """A text for each image, of ``best_of_n`` ``section.num_samples``.

    Drawn ones depend on ``section.seed`` and the image's number in ``rows`` (by default its place).
    """
    ids_BP, mask_BP = (x.to(image_BCHW.device) for x in task.prompts(instructions))
    prompts = {"image_BCHW": image_BCHW, "input_ids_BT": ids_BP, "attention_mask_BT": mask_BP}
    numbers = range(len(ids_BP)) if rows is None else rows
    return generate_batch(task, model, prompts | {"index_B": torch.tensor(numbers)}, section)


@torch.no_grad()
def generate_batch(
    task: CaptionTask | VqaTask, model: VisionLanguage, batch: Batch, section: Generate
) -> list[list[str]]:
    """As ``generate_texts``, for each row of a batch of prompts, as ``VqaTask.prompt_batch``.

    Drawn ones depend on ``section.seed`` and the row's ``index_B``. Where the decoder continues the
    prompt, the longest one of the batch bounds the new tokens.
    """
    given = model.decoder_input(batch)
    room = task.room(given.ids_BT)
    if room < 1:
        raise UserError(
            f"the prompt takes {given.ids_BT.shape[1]} of {task.max_length} tokens and leaves none "
            "for a text; shorten it or raise model.decoder.max_length",
            key="model.decoder.max_length",
        )
    keywords, each = _keywords(section, room, task), 1
    if keywords["do_sample"]:
        each = section.num_samples if section.method == "best_of_n" else 1
        keywords["num_return_sequences"] = each
        numbers = batch["index_B"].tolist()
        uniform_BT = uniforms(section.seed, numbers, each, keywords["max_new_tokens"])
        keywords["logits_processor"] = processors(
            uniform_BT.to(given.ids_BT.device),
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
        )
    found = model.decoder.generate(given, **keywords).tolist()
    texts = [task.tokenizer.decode(ids) for ids in found]
    return [texts[start : start + each] for start in range(0, len(texts), each)]


# --- draws


def uniforms(seed: int, rows: Sequence[int], num_texts: int, num_tokens: int) -> Tensor:
    """Numbers in [0, 1), fp64 [len(rows) · num_texts, num_tokens], the texts of a row together.

    Those of a row's k-th text are the same whatever else is asked for: each text has a splitmix64
    (Steele et al. 2014) of its own, which begins at a hash of (seed, row, k).
    """
    starts = [hash64(seed, row, text) for row in rows for text in range(num_texts)]
    steps = np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state_BT = np.array(starts, dtype=np.uint64)[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state_BT = (state_BT ^ state_BT >> np.uint64(shift)) * np.uint64(factor)
    state_BT ^= state_BT >> np.uint64(31)
    return torch.from_numpy((state_BT >> np.uint64(11)) * 2.0**-53)


class Draw(transformers.LogitsProcessor):
    """Leaves each row the one token that its next number chooses, at probability 1.

    ``uniform_BT`` is used up from the left, a column a call. It must stand behind whatever else
    changes the scores.
    """

    def __init__(self, uniform_BT: Tensor) -> None:
        self._columns = iter(uniform_BT.split(1, dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] → 0 at the drawn token, −∞ elsewhere."""
        uniform_B1 = next(self._columns)
        # fp64: in fp32 a token of less than 6e-8 could not be drawn at all
        cumulated_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        place_B1 = uniform_B1 * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, place_B1, right=True)
        # scores that are no numbers point behind the vocabulary
        token_B1 = token_B1.clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def processors(
    uniform_BT: Tensor, *, temperature: float, top_k: int, top_p: float
) -> transformers.LogitsProcessorList:
    """Temperature, top-k and top-p in the order of transformers' ``generate``, then the draw."""
    found = transformers.LogitsProcessorList()
    if temperature != 1:
        found.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k:
        found.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(transformers.TopPLogitsWarper(top_p))
    found.append(Draw(uniform_BT))
    return found
