"""Decoders as functions of tensors: one graph for prefill and decode steps, with a cache.

What a decoder has seen comes in as ``past`` and goes out longer as ``present``: keys and values of
each layer, [B, heads, seen, width]. The first call gives it the image's tokens and the prompt, with
a past of length 0; each later call the tokens generated since, with an image of length 0.
Logits [B, T, V] are those of the call's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

from transformers import DynamicCache, EncoderDecoderCache  # isort: skip
from engine import masks
from engine.errors import UserError
from engine.models.decoders import t5_family
from engine.models.decoders.language_model import Decoder
from engine.models.decoders.prefix import PrefixDecoder
from engine.models.decoders.t5_cross import T5CrossDecoder

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Argument:
    """An example of one input, and the names of those of its sizes that may change, by axis."""

    name: str
    example: Tensor
    sizes: dict[int, str]


class PrefixStep(nn.Module):
    """A causal language model behind ``num_image`` image tokens."""

    kinds = ("self",)
    text_inputs: tuple[str, ...] = ()  # besides input_ids: int64 [B, all text so far]

    def __init__(self, decoder: PrefixDecoder, num_image: int) -> None:
        super().__init__()
        self.model = decoder.model
        self.decoder = [decoder]  # in a list: its parameters have one name
        self.num_image = num_image

    def run(
        self, input_ids: Tensor, image_tokens: Tensor, past: Sequence[Tensor],
        segment_BL: Tensor, valid_BL: Tensor, position_BS: Tensor,
    ) -> Outputs:  # fmt: skip
        """Logits and cache. Segments and validity are the text's, positions everything's."""
        (decoder,) = self.decoder
        embeds_BQD = torch.cat([image_tokens, self.model.get_input_embeddings()(input_ids)], dim=1)
        num_text, num_new = input_ids.shape[1], embeds_BQD.shape[1]
        image_BN = segment_BL.new_zeros(input_ids.shape[0], self.num_image)
        sees_BQS = masks.visible(
            torch.cat([image_BN, torch.ones_like(segment_BL)], dim=1),
            torch.cat([image_BN, segment_BL], dim=1),
            last=num_new,
        ) & (torch.cat([torch.ones_like(image_BN), valid_BL], dim=1)[:, None, :] > 0)
        cache = DynamicCache(_pairs(past))
        found = decoder.run(
            embeds_BQD,
            masks.additive(sees_BQS, embeds_BQD.dtype),
            position_BS[:, position_BS.shape[1] - num_new :],
            image_BN.new_full((input_ids.shape[0],), self.num_image),
            cache,
            key_position=position_BS,
        )
        hidden_BTD = found.last_hidden_state[:, num_new - num_text :]
        return self.model.get_output_embeddings()(hidden_BTD), *_flat(cache)

    def cached(self, image_BND: Tensor) -> Outputs:
        """Keys and values of one image token, for their shapes."""
        found = self.decoder[0].base[0](inputs_embeds=image_BND[:, :1], use_cache=True)
        return _flat(found.past_key_values)


class CausalStep(PrefixStep):
    """Of texts. ``attention_mask`` is 0 for padding, which is on the left."""

    text_inputs = ("attention_mask",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor, past: list[Tensor]
    ) -> Outputs:
        image_BN = attention_mask.new_ones(input_ids.shape[0], self.num_image)
        counted_BS = torch.cat([image_BN, attention_mask], dim=1)
        position_BS = (counted_BS.cumsum(1) - 1).clamp_min(0)
        segment_BL = torch.zeros_like(attention_mask)
        return self.run(input_ids, image_tokens, past, segment_BL, attention_mask, position_BS)


class LabelStep(PrefixStep):
    """Of labels. ``segment_ids`` are 0 for the prompt, which all see, and a label's number for its
    tokens, which it alone sees; ``position_ids`` count from the text's first."""

    text_inputs = ("segment_ids", "position_ids")

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor, image_tokens: Tensor,
        past: list[Tensor],
    ) -> Outputs:  # fmt: skip
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
        self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor, past: list[Tensor]
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
        hidden_BTD = t5_family.scaled(self.model, hidden_BTD)
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


# --- examples, by which torch.export follows a step

_ROWS, _TEXT, _SAID = 2, 3, 4  # of the examples: what comes, and what came before


def step_of(decoder: Decoder, num_image: int) -> PrefixStep | T5CrossStep:
    """The function of a decoder of images of that many tokens. Raises UserError."""
    if isinstance(decoder, PrefixDecoder):
        return (LabelStep if decoder.label_mask else CausalStep)(decoder, num_image)
    if isinstance(decoder, T5CrossDecoder):
        return T5CrossStep(decoder)
    raise UserError(
        f"decoder {type(decoder).__name__} cannot be exported to ONNX; causal, truncated and "
        "t5_cross can",
        key="model.decoder.name",
    )


def arguments_of(
    step: PrefixStep | T5CrossStep, num_image: int, width: int
) -> tuple[list[Argument], list[Argument], list[str]]:
    """Examples of the function's inputs, of those that are its past, and names of its outputs.

    An example's length is never 0 or 1, which torch.export takes for a promise.
    """
    brought = max(2, num_image)  # image tokens
    image_BND = torch.zeros(_ROWS, brought, width)
    with torch.no_grad():
        cached = step.cached(image_BND)
    kinds = step.kinds
    each = len(cached) // len(kinds)
    # a prefix is in the model's own cache, before the text; what is brought comes on top
    seen = _SAID + (0 if "image" in kinds else num_image)
    sizes = {"self": ("past_length", seen), "image": ("past_image_length", num_image + 1)}
    past, names = [], ["logits"]
    for place, tensor in enumerate(cached):
        kind = kinds[place // each]
        name = f"{kind}.{place % each // 2}.{'value' if place % 2 else 'key'}"
        size, length = sizes[kind]
        example = torch.zeros(_ROWS, tensor.shape[1], length, tensor.shape[3])
        past.append(Argument(f"past.{name}", example, {0: "batch", 2: size}))
        names.append(f"present.{name}")
    num_text = _TEXT + _SAID + (0 if "image" in kinds else brought)
    ids_BT = torch.zeros(_ROWS, _TEXT, dtype=torch.int64)
    whole_BL = torch.ones(_ROWS, num_text, dtype=torch.int64)
    sizes_BL = {0: "batch", 1: "text_length"}
    given = [
        Argument("input_ids", ids_BT, {0: "batch", 1: "length"}),
        # each its own memory: two arguments that are one tensor would become one input
        *(Argument(name, whole_BL.clone(), sizes_BL) for name in step.text_inputs),
        Argument("image_tokens", image_BND, {0: "batch", 1: "image_length"}),
    ]
    return given, past, names
