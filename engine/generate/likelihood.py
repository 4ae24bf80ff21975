"""How likely given answers are: Σ log p of their tokens, without anything being generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.data.text.templates import Template
from engine.losses.language_model import IGNORED
from engine.models.decoders.language_model import Decoder, DecoderInput
from engine.models.vision_language import VisionLanguage
from engine.tasks.vqa import VqaTask
from engine.types import Batch

_MOST_ROWS = 1024  # targets read at once
_MOST_BYTES = 2**31  # of what is known of prompts, laid beside each of the targets read at once


class Likelihoods(NamedTuple):
    """Of prompt 0's targets, then of prompt 1's …: exp(log_p / tokens) is a token's mean."""

    log_p_R: Tensor  # Σ over a target's tokens and its end; fp32 or wider
    tokens_R: Tensor  # int64, their number


def log_likelihoods(
    task: VqaTask,
    model: VisionLanguage,
    image_MND: Tensor,
    prompts: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    num_images: Sequence[int] | None = None,
    template: Template | None = None,
) -> Likelihoods:
    """Of each of ``targets[i]`` as the answer to ``prompts[i]``.

    Images and prompt are encoded once for all of a prompt's targets; the decoder runs over the
    targets' tokens alone. Gradients flow to the images where they are recorded.

    Args:
        image_MND: ``model.image_tokens`` of the first prompt's images, then of the second's …
        prompts: questions, put into the task's template, or into ``template``.
        num_images: of each prompt; absent: one each.
    """
    device = image_MND.device
    ids_BP, mask_BP = (x.to(device) for x in task.prompts(prompts, num_images, template))
    counts_B = None if num_images is None else torch.tensor(num_images, device=device)
    given = DecoderInput(image_MND, ids_BP, mask_BP, counts_B)
    return _likelihoods(task, model.decoder, given, targets)


def batch_likelihoods(
    task: VqaTask, model: VisionLanguage, batch: Batch, targets: Sequence[Sequence[str]]
) -> Likelihoods:
    """As ``log_likelihoods``, of a batch of prompts with images, as ``VqaTask.prompt_batch``."""
    return _likelihoods(task, model.decoder, model.decoder_input(batch), targets)


def _likelihoods(
    task: VqaTask, decoder: Decoder, given: DecoderInput, targets: Sequence[Sequence[str]]
) -> Likelihoods:
    known, device = decoder.prefill(given), given.ids_BT.device
    different = dict.fromkeys(text for given in targets for text in given)
    ids = {text: torch.tensor(task.answer_ids(text)) for text in different}
    answers = [(row, ids[text]) for row, given in enumerate(targets) for text in given]
    tokens = torch.tensor([len(answer) for _, answer in answers])
    # of like length together: an answer is padded to the longest beside it
    order = tokens.argsort(stable=True)
    fitting = max(1, _MOST_BYTES // max(1, known.row_bytes))
    found = []
    for chosen in order.split(min(_MOST_ROWS, fitting)):
        labels_RL = pad_sequence(
            [answers[i][1] for i in chosen], batch_first=True, padding_value=IGNORED
        )
        row_R = torch.tensor([answers[i][0] for i in chosen], device=device)
        found.append(-decoder.nll_after(known, row_R, labels_RL.to(device)))
    back = order.argsort().to(device)
    return Likelihoods(torch.cat(found)[back], tokens.to(device))
