"""T5 with images in its encoder's text: question and image attend to each other both ways.

At each mark of an image (``IMAGE_ID``) in the question stand that image's tokens. The decoder sees
the encoder's states and the answer alone (CLIP-FlanT5, arXiv 2404.01291).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from engine.config.schema import Decoder as Section
from engine.models.decoders import language_model as lm
from engine.models.decoders import t5_family
from engine.models.decoders.language_model import Decoder, DecoderInput

ENCODES_PROMPT = True  # prompt and answer are two texts, not one
IMAGE_ID = -200  # the mark of an image among token ids, as LLaVA has it
_SAME_BLOCKS = ("t5", "mt5")  # families whose blocks have the same names


class Encoded(NamedTuple):
    """Questions and their images as the decoder attends to them."""

    states_BSD: Tensor
    mask_BS: Tensor

    @property
    def row_bytes(self) -> int:
        """As keys and values of a layer, which are there one layer at a time."""
        return 2 * self.states_BSD[0].nbytes


class T5Decoder(Decoder):
    """Both halves of T5. The marks say where images stand; ``num_images_B`` is not used."""

    def prefill(self, given: DecoderInput) -> Encoded:
        """The encoder's states of prompts with their images."""
        words_BT = given.ids_BT.masked_fill(given.ids_BT == IMAGE_ID, 0)
        text_BTD = self.model.get_input_embeddings()(words_BT)
        embeds_BSD, mask_BS = splice(text_BTD, given)
        found = self.model.encoder(inputs_embeds=embeds_BSD, attention_mask=mask_BS)
        return Encoded(found.last_hidden_state, mask_BS)

    def nll_after(self, known: Encoded, rows_R: Tensor, labels_RL: Tensor) -> Tensor:
        ids_RL = self._shifted(labels_RL)
        if shares_memory(self.model):
            hidden_RLD = decode_answers(self.model, ids_RL, *known, rows_R)
        else:
            memory = known.states_BSD[rows_R], known.mask_BS[rows_R]
            hidden_RLD = t5_family.decode(self.model, ids_RL, None, *memory)
        return self.answer_losses(hidden_RLD, labels_RL)

    def label_states(self, given: DecoderInput, labels: Tensor) -> Tensor:
        """Those of the answers, [B, L, D]; ``labels`` are [B, L]."""
        return t5_family.decode(self.model, self._shifted(labels), None, *self.prefill(given))

    def _shifted(self, labels_BL: Tensor) -> Tensor:
        """Decoder inputs; behind an answer's end any token will do, as no learned one sees it."""
        start_B1 = torch.full_like(labels_BL[:, :1], self.start_id)
        return torch.cat([start_B1, labels_BL[:, :-1].clamp_min(0)], dim=1)

    def generate(self, given: DecoderInput, **options: Any) -> Tensor:
        known = self.prefill(given)
        found = self.model.generate(
            # a new object for each call: generate repeats its rows in place
            encoder_outputs=BaseModelOutput(last_hidden_state=known.states_BSD),
            attention_mask=known.mask_BS,
            decoder_input_ids=torch.full_like(given.ids_BT[:, :1], self.start_id),
            # one that grows: generate's own has as many layers as the encoder
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            **options,
        )
        return found[:, 1:]


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> T5Decoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = t5_family.configuration(section, vocab_size, pad_id, eos_id)
    model = lm.load(transformers.AutoModelForSeq2SeqLM, section, config, vocab_size)
    return T5Decoder(model, config.d_model, config.decoder_start_token_id)


def splice(text_BTD: Tensor, given: DecoderInput) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, D] of texts with their images at their marks, and their mask [B, S].

    ``text_BTD`` are embeddings of the texts; those at marks, and what is masked, are not looked at.
    Padded on the right. Raises ValueError where there are more or fewer images than marks.
    """
    image_MND, ids_BT, mask_BT, _ = given
    mark_BT = (ids_BT == IMAGE_ID) & mask_BT.bool()
    if (marks := int(mark_BT.sum())) != len(image_MND):
        raise ValueError(f"the texts have the marks of {marks} images, but {len(image_MND)} came")
    size_BT = torch.where(mark_BT, image_MND.shape[1], mask_BT.long())
    length_B = size_BT.sum(1)
    there_BS = torch.arange(int(length_B.max()), device=ids_BT.device) < length_B[:, None]
    # all rows' places in turn: tokens of images in the order in which they come, the rest is text
    image_P = mark_BT.flatten().repeat_interleave(size_BT.flatten())
    found_PD = text_BTD.new_zeros(len(image_P), text_BTD.shape[2])
    found_PD[image_P] = image_MND.flatten(0, 1).to(text_BTD.dtype)
    found_PD[~image_P] = text_BTD[mask_BT.bool() & ~mark_BT]
    embeds_BSD = text_BTD.new_zeros(*there_BS.shape, text_BTD.shape[2])
    embeds_BSD[there_BS] = found_PD
    return embeds_BSD, there_BS.long()


# --- answers that share prompts


def shares_memory(model: Any) -> bool:
    """Whether ``decode_answers`` can take the model: not in training, its weights not sharded."""
    if model.training or model.config.model_type not in _SAME_BLOCKS:
        return False
    weights = list(model.decoder.block[0].parameters())
    plain = all(type(weight) is nn.Parameter and weight.numel() for weight in weights)
    return plain and weights[0].dtype != torch.float16  # which transformers clamps


def decode_answers(
    model: Any, ids_RL: Tensor, memory_PSD: Tensor, mask_PS: Tensor, rows_R: Tensor
) -> Tensor:
    """States [R, L, D] of answers, each of which attends to its row of ``memory_PSD``.

    transformers projects the encoder's states to keys and values for each row of the decoder. Here
    it is done once a prompt, however many answers it has. For few queries not even that pays: they
    are brought to the states instead, q · (W s) = (Wᵀ q) · s and Σ a (W s) = W Σ a s.
    """
    decoder = model.decoder
    hidden_RLD = decoder.embed_tokens(ids_RL)
    lowest = torch.finfo(hidden_RLD.dtype).min
    length = ids_RL.shape[1]
    later_11LL = hidden_RLD.new_full((1, 1, length, length), lowest).triu(1)
    away_R11S = (mask_PS[rows_R] == 0)[:, None, None]
    mask_R11S = hidden_RLD.new_zeros(away_R11S.shape).masked_fill(away_R11S, lowest)
    position = None
    for block in decoder.block:
        hidden_RLD, position, _ = block.layer[0](
            hidden_RLD, attention_mask=later_11LL, position_bias=position
        )
        cross = _cross_attention(block.layer[1], hidden_RLD, memory_PSD, mask_R11S, rows_R)
        hidden_RLD = block.layer[-1](hidden_RLD + cross)
    return t5_family.scaled(model, decoder.final_layer_norm(hidden_RLD))


def _cross_attention(
    layer: Any, hidden_RLD: Tensor, memory_PSD: Tensor, mask_R11S: Tensor, rows_R: Tensor
) -> Tensor:
    """What cross-attention adds to the answers' states."""
    attention = layer.EncDecAttention
    rows, length, width = hidden_RLD.shape
    size, heads = attention.key_value_proj_dim, attention.n_heads
    query_RLD = attention.q(layer.layer_norm(hidden_RLD))
    query_RHLE = query_RLD.view(rows, length, heads, size).transpose(1, 2)
    projections = attention.k, attention.v
    # products for each of the memory's states: of queries brought to it, and of its keys
    cheap = rows * length * (width - size) < len(memory_PSD) * width * size
    if cheap and all(type(linear) is nn.Linear for linear in projections):
        to_key, to_value = (linear.weight.view(heads, size, -1) for linear in projections)
        memory_RSD = memory_PSD[rows_R]
        near_RQD = (query_RHLE @ to_key).flatten(1, 2)
        weight_RHLS = (near_RQD @ memory_RSD.mT).view(rows, heads, length, -1) + mask_R11S
        seen_RQD = weight_RHLS.softmax(-1).flatten(1, 2) @ memory_RSD
        seen_RHLE = seen_RQD.view(rows, heads, length, -1) @ to_value.mT
    else:
        key_RHSE, value_RHSE = (
            linear(memory_PSD).unflatten(-1, (heads, size)).transpose(1, 2)[rows_R]
            for linear in projections
        )
        seen_RHLE = F.scaled_dot_product_attention(
            query_RHLE, key_RHSE, value_RHSE, attn_mask=mask_R11S.to(query_RHLE.dtype), scale=1.0
        )
    return attention.o(seen_RHLE.transpose(1, 2).flatten(2))
