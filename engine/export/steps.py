"""Decoders as functions of tensors: one graph reads a prompt and goes on with it, by a cache.

What a decoder has seen comes in as ``past`` and goes out longer as ``present``: keys and values of
each layer, [B, heads, seen, width]. The first call gives it the image's tokens and the prompt, with
a past of length 0; each later call the tokens that were said since, with an image of length 0.
Logits [B, T, V] are those of the call's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

from transformers import DynamicCache, EncoderDecoderCache  # isort: skip
from engine import masks
from engine.models.decoders.causal import CausalDecoder
from engine.models.decoders.t5_cross import T5CrossDecoder
from engine.models.decoders.truncated import TruncatedDecoder

Outputs = tuple[Tensor, ...]


class PrefixStep(nn.Module):
    """A causal language model behind ``num_image`` image tokens."""

    kinds = ("self",)
    text_inputs: tuple[str, ...] = ()  # besides input_ids: int64 [B, all text so far]

    def __init__(self, decoder: CausalDecoder | TruncatedDecoder, num_image: int) -> None:
        super().__init__()
        self.model, self.base = decoder.model, decoder.base
        self.text_positions = decoder.text_positions
        self.takes_positions = decoder.takes_positions
        self.num_image = num_image

    def run(
        self,
        input_ids: Tensor,
        image_tokens: Tensor,
        past: Sequence[Tensor],
        segment_BL: Tensor,
        valid_BL: Tensor,
        position_BS: Tensor,
    ) -> Outputs:
        """Logits and cache. Segments and validity are the text's, positions everything's."""
        embeds_BQD = torch.cat([image_tokens, self.model.get_input_embeddings()(input_ids)], dim=1)
        num_text, num_new = input_ids.shape[1], embeds_BQD.shape[1]
        image_BN = segment_BL.new_zeros(input_ids.shape[0], self.num_image)
        sees_BQS = masks.visible(
            torch.cat([image_BN, torch.ones_like(segment_BL)], dim=1),
            torch.cat([image_BN, segment_BL], dim=1),
            last=num_new,
        ) & (torch.cat([torch.ones_like(image_BN), valid_BL], dim=1)[:, None, :] > 0)
        options = {}
        if self.takes_positions:
            options["position_ids"] = position_BS[:, position_BS.shape[1] - num_new :]
        cache = DynamicCache(_pairs(past))
        num_image_B = image_BN.new_full((input_ids.shape[0],), self.num_image)
        with self.text_positions.after(num_image_B), _alibi_at(self.base[0], position_BS):
            found = self.base[0](
                inputs_embeds=embeds_BQD,
                attention_mask=masks.additive(sees_BQS, embeds_BQD.dtype),
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        hidden_BTD = found.last_hidden_state[:, num_new - num_text :]
        return self.model.get_output_embeddings()(hidden_BTD), *_flat(cache)

    def cached(self, image_BND: Tensor) -> Outputs:
        """Keys and values of one image token, for their shapes."""
        found = self.base[0](inputs_embeds=image_BND[:, :1], use_cache=True)
        return _flat(found.past_key_values)


class CausalStep(PrefixStep):
    """See ``CausalDecoder``. ``attention_mask`` is 0 for padding, which is on the left."""

    text_inputs = ("attention_mask",)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_tokens: Tensor,
        past: list[Tensor],
    ) -> Outputs:
        image_BN = attention_mask.new_ones(input_ids.shape[0], self.num_image)
        counted_BS = torch.cat([image_BN, attention_mask], dim=1)
        position_BS = (counted_BS.cumsum(1) - 1).clamp_min(0)
        segment_BL = torch.zeros_like(attention_mask)
        return self.run(input_ids, image_tokens, past, segment_BL, attention_mask, position_BS)


class TruncatedStep(PrefixStep):
    """See ``TruncatedDecoder``. ``segment_ids`` are 0 for the prompt, which all see, and a label's
    number for its tokens, which it alone sees; ``position_ids`` count from the text's first."""

    text_inputs = ("segment_ids", "position_ids")

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        position_ids: Tensor,
        image_tokens: Tensor,
        past: list[Tensor],
    ) -> Outputs:
        image_N = torch.arange(self.num_image, device=input_ids.device)
        image_BN = image_N.expand(input_ids.shape[0], -1)
        position_BS = torch.cat([image_BN, self.num_image + position_ids], dim=1)
        valid_BL = torch.ones_like(segment_ids)
        return self.run(input_ids, image_tokens, past, segment_ids, valid_BL, position_BS)


class T5CrossStep(nn.Module):
    """T5's decoder over image tokens (see ``T5CrossDecoder``).

    Its own keys and values come first, for all layers, then those of the image, for all layers. An
    image that is given goes behind what is known of it.
    """

    kinds = ("self", "image")
    text_inputs = ("attention_mask",)

    def __init__(self, decoder: T5CrossDecoder) -> None:
        super().__init__()
        self.model = decoder.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_tokens: Tensor,
        past: list[Tensor],
    ) -> Outputs:
        half, rows, num_new = len(past) // 2, input_ids.shape[0], input_ids.shape[1]
        sees_BTS = masks.visible(torch.ones_like(attention_mask), last=num_new)
        sees_BTS = sees_BTS & (attention_mask[:, None, :] > 0)
        own, image = DynamicCache(_pairs(past[:half])), DynamicCache(_pairs(past[half:]))
        cache = EncoderDecoderCache(own, image)
        cache.is_updated = dict.fromkeys(range(half // 2), False)  # there may be more to come
        num_memory = past[half].shape[2] + image_tokens.shape[1]
        hidden_BTD = self.model.decoder(
            input_ids=input_ids,
            attention_mask=masks.additive(sees_BTS, image_tokens.dtype),
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=image_tokens.new_zeros(rows, 1, 1, num_memory),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        if self.model.config.scale_decoder_outputs:  # where the head is the table of tokens
            hidden_BTD = hidden_BTD * self.model.config.d_model**-0.5
        logits_BTV = self.model.get_output_embeddings()(hidden_BTD)
        return logits_BTV, *_flat(own), *_flat(image)

    def cached(self, image_BND: Tensor) -> Outputs:
        """Keys and values of one token and of an image, for their shapes."""
        ids_BT = torch.zeros(len(image_BND), 1, dtype=torch.int64)
        found = self.model.decoder(
            input_ids=ids_BT, encoder_hidden_states=image_BND, use_cache=True
        ).past_key_values
        return *_flat(found.self_attention_cache), *_flat(found.cross_attention_cache)


def _pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _flat(cache: Any) -> Outputs:
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class _Bias:
    """Biases [B, H, 1, S] for MPT, whose layers cut [H, 1, S] to the lengths that they meet: by
    arithmetic that torch.export cannot follow, and these have their length already."""

    def __init__(self, bias_BH1S: Tensor) -> None:
        self.bias_BH1S, self.shape = bias_BH1S, bias_BH1S.shape[1:]

    def size(self, axis: int) -> int:
        return 1

    def __getitem__(self, part: Any) -> Tensor:
        return self.bias_BH1S


@contextmanager
def _alibi_at(base: Any, position_BS: Tensor) -> Iterator[None]:
    """MPT's ALiBi by the positions of all keys; other models are as they were.

    A head's bias is its slope times the position: softmax takes no notice of a constant.
    """
    make = getattr(type(base), "build_mpt_alibi_tensor", None)
    if make is None:
        yield
        return

    def biases(num_heads: int, longest: int, **options: Any) -> _Bias:
        two_H12 = make(base, num_heads, 2, **options)
        slope_H1 = two_H12[..., 1] - two_H12[..., 0]
        return _Bias(slope_H1[..., None] * position_BS[:, None, None])

    before = vars(base).get("build_mpt_alibi_tensor")
    base.build_mpt_alibi_tensor = biases
    try:
        yield
    finally:
        del base.build_mpt_alibi_tensor
        if before is not None:
            base.build_mpt_alibi_tensor = before
