"""T5 with images in its encoder's text: question and image attend to each other both ways.

At each mark of an image (``splice.IMAGE_ID``) in the question stand that image's tokens. The
decoder sees the encoder's states and the answer alone (CLIP-FlanT5, arXiv 2404.01291).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from transformers import DynamicCache, EncoderDecoderCache  # isort: skip
from transformers.modeling_outputs import BaseModelOutput  # isort: skip
from engine.config.schema import Decoder as Section
from engine.models.decoders import language_model as lm
from engine.models.decoders import t5_family
from engine.models.decoders.language_model import AnsweringDecoder
from engine.models.decoders.splice import IMAGE_ID, splice

ENCODES_PROMPT = True  # prompt and answer are two texts, not one


class Encoded(NamedTuple):
    """Questions and their images as the decoder attends to them."""

    states_BSD: Tensor
    mask_BS: Tensor

    @property
    def row_bytes(self) -> int:
        """As keys and values of a layer, which are there one layer at a time."""
        return 2 * self.states_BSD[0].nbytes


class T5Decoder(AnsweringDecoder):
    """Both halves of T5. The marks say where images stand; ``num_images_B`` is not used."""

    def prefill(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Encoded:
        """The encoder's states of prompts with their images."""
        words = prompt_ids_BT.masked_fill(prompt_ids_BT == IMAGE_ID, 0)
        text_BTD = self.model.get_input_embeddings()(words)
        embeds_BSD, mask_BS = splice(text_BTD, image_MND, prompt_ids_BT, prompt_mask_BT)
        states_BSD = self.model.encoder(
            inputs_embeds=embeds_BSD, attention_mask=mask_BS
        ).last_hidden_state
        return Encoded(states_BSD, mask_BS)

    def nll_after(
        self,
        known: Encoded,
        rows_R: Tensor,
        labels_RL: Tensor,
    ) -> Tensor:
        """Σ −log p [R] of answers, padded with −100; ``rows_R`` are their rows of ``known``."""
        ids_RL = self._shifted(labels_RL)
        if t5_family.shares_memory(self.model):
            hidden_RLD = t5_family.decode_answers(self.model, ids_RL, *known, rows_R)
        else:
            memory = known.states_BSD[rows_R], known.mask_BS[rows_R]
            hidden_RLD = t5_family.decode(self.model, ids_RL, None, *memory)
        return self.answer_losses(hidden_RLD, labels_RL)

    def label_states(
        self,
        image_MND: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        labels: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Tensor:
        """Those of the answers, [B, L, D]; ``labels`` are [B, L]."""
        known = self.prefill(image_MND, input_ids_BT, attention_mask_BT)
        return t5_family.decode(self.model, self._shifted(labels), None, *known)

    def _shifted(self, labels_BL: Tensor) -> Tensor:
        """Decoder inputs; behind an answer's end any token will do, as no learned one sees it."""
        start_B1 = torch.full_like(labels_BL[:, :1], self.start_id)
        return torch.cat([start_B1, labels_BL[:, :-1].clamp_min(0)], dim=1)

    def generate(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Answers to the prompts, int64 [B · num_return_sequences, new tokens]."""
        known = self.prefill(image_MND, prompt_ids_BT, prompt_mask_BT)
        start_B1 = torch.full_like(prompt_ids_BT[:, :1], self.start_id)
        found = self.model.generate(
            # a new object for each call: generate repeats its rows in place
            encoder_outputs=BaseModelOutput(last_hidden_state=known.states_BSD),
            attention_mask=known.mask_BS,
            decoder_input_ids=start_B1,
            # one that grows: generate's own has as many layers as the encoder
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            **options,
        )
        return found[:, 1:]


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> T5Decoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = t5_family.configuration(section, vocab_size, pad_id, eos_id)
    model = lm.load(transformers.AutoModelForSeq2SeqLM, section, config)
    lm.finish(model, section, vocab_size)
    return T5Decoder(model, config.d_model, config.decoder_start_token_id)
