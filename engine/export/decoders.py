"""A decoder's step with examples of what goes in, by which torch.export follows it."""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.export.graphs import Argument
from engine.export.steps import CausalStep, PrefixStep, T5CrossStep, TruncatedStep
from engine.models.decoders.causal import CausalDecoder
from engine.models.decoders.language_model import Decoder
from engine.models.decoders.t5_cross import T5CrossDecoder
from engine.models.decoders.truncated import TruncatedDecoder

Step = PrefixStep | T5CrossStep

_ROWS, _TEXT, _SAID = 2, 3, 4  # of the examples: what comes, and what came before


def step_of(decoder: Decoder, num_image: int) -> Step:
    """The function of a decoder of images of that many tokens. Raises UserError."""
    if isinstance(decoder, CausalDecoder):
        return CausalStep(decoder, num_image)
    if isinstance(decoder, TruncatedDecoder):
        return TruncatedStep(decoder, num_image)
    if isinstance(decoder, T5CrossDecoder):
        return T5CrossStep(decoder)
    raise UserError(
        f"decoder {type(decoder).__name__} has no form in ONNX; causal, truncated and t5_cross "
        "have one",
        key="model.decoder.name",
    )


def arguments_of(
    step: Step, num_image: int, width: int
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
