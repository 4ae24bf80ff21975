"""Any causal language model with the image as a prefix (GIT, arXiv 2205.14100).

Image tokens see each other both ways and none of the text; text sees the image and what precedes
it. Positions that are computed (RoPE, ALiBi) count the image's tokens; learned ones are kept for
the text, which begins at the first of them, so that an image takes none of a short table away.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from engine import masks
from engine.config.model import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.decoders.language_model import Decoder

_LEARNED = ("embed_positions", "wpe")  # names of tables of positions: OPT and its kin, GPT-2


class CausalDecoder(Decoder):
    """Image tokens before the text."""

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__(model, width, start_id)
        self.base = [model.get_decoder()]  # in a list: its parameters have one name
        self.text_positions = TextPositions(model)
        self.takes_positions = "position_ids" in inspect.signature(self.base[0].forward).parameters

    def hidden(self, image_BND: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States [B, T, D] of the text, ready for the head."""
        num_prefix = image_BND.shape[1]
        text_BTD = self.model.get_input_embeddings()(input_ids_BT)
        embeds_BSD = torch.cat([image_BND.to(text_BTD.dtype), text_BTD], dim=1)
        mask = masks.prefix(num_prefix, attention_mask_BT, embeds_BSD.dtype)
        hidden_BSD = self._run(embeds_BSD, mask, num_prefix, use_cache=False).last_hidden_state
        return hidden_BSD[:, num_prefix:]

    def _run(self, embeds_BSD: Tensor, mask: Tensor, num_prefix: int, *, use_cache: bool) -> Any:
        options = {}
        if self.takes_positions:
            rows, length = embeds_BSD.shape[:2]
            options["position_ids"] = torch.arange(length, device=mask.device).expand(rows, -1)
        with self.text_positions.after(num_prefix):
            return self.base[0](
                inputs_embeds=embeds_BSD, attention_mask=mask, use_cache=use_cache, **options
            )

    def prefill(self, image_BND: Tensor) -> Any:
        """Keys and values of the image tokens, as transformers' cache."""
        rows, length = image_BND.shape[:2]
        embeds_BND = image_BND.to(self.model.get_input_embeddings().weight.dtype)
        full = torch.zeros(rows, 1, length, length, dtype=embeds_BND.dtype, device=image_BND.device)
        return self._run(embeds_BND, full, length, use_cache=True).past_key_values

    def generate(
        self, image_BND: Tensor, prompt_ids_BT: Tensor, prompt_mask_BT: Tensor, **options: Any
    ) -> Tensor:
        """Texts after the prompt, int64 [B · num_return_sequences, new tokens]."""
        num_prefix = image_BND.shape[1]
        cache = self.prefill(image_BND)
        copies = options.get("num_beams", 1)
        if options.get("do_sample"):
            copies *= options.get("num_return_sequences", 1)
        if copies > 1:  # generate repeats the prompts, not the cache
            cache.batch_repeat_interleave(copies)
        seen_BN = prompt_mask_BT.new_ones(len(image_BND), num_prefix)
        with self.text_positions.after(num_prefix):
            found = self.model.generate(
                prompt_ids_BT,
                attention_mask=torch.cat([seen_BN, prompt_mask_BT], dim=1),
                past_key_values=cache,
                **({"use_cache": True} | options),  # which MPT does not by default
            )
        return found[:, prompt_ids_BT.shape[1] :]


class TextPositions:
    """Learned positions for text alone: behind an image of N tokens, position N is the text's 0.

    The table is left as it is, with its name and weights; its answers are bent while in use. Image
    tokens get no position: they keep the order that the image encoder gave them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_prefix: int | None = None  # None: the table answers as ever
        self.tables = [
            module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in _LEARNED and isinstance(module, nn.Embedding)
        ]
        for table in self.tables:
            forward = table.forward
            table.forward = self._wrapped(forward)  # type: ignore[method-assign]

    def after(self, num_prefix: int) -> _After:
        """Within the block, positions are counted behind ``num_prefix`` image tokens."""
        return _After(self, num_prefix)

    def _wrapped(self, forward: Any) -> Any:
        takes = inspect.signature(forward).parameters

        def look_up(*args: Any, **kwargs: Any) -> Tensor:
            if self.num_prefix is None:
                return forward(*args, **kwargs)
            bound = inspect.signature(forward).bind(*args, **kwargs)
            name = "position_ids" if "position_ids" in takes else next(iter(takes))
            position_BT = bound.arguments[name] - self.num_prefix
            bound.arguments[name] = position_BT.clamp_min(0)
            found_BTD = forward(*bound.args, **bound.kwargs)
            return found_BTD * (position_BT >= 0).unsqueeze(-1).to(found_BTD.dtype)

        return look_up


class _After:
    def __init__(self, positions: TextPositions, num_prefix: int) -> None:
        self.positions, self.num_prefix = positions, num_prefix

    def __enter__(self) -> None:
        self.positions.num_prefix = self.num_prefix

    def __exit__(self, *error: object) -> None:
        self.positions.num_prefix = None


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> CausalDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = lm.configuration_of(
        section, vocab_size, pad_id, encoder_decoder=False,
        examples="gpt2, opt, llama, mpt",
    )  # fmt: skip
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"a {config.model_type!r} model is no causal language model; known are gpt2, opt, "
            "llama, mpt and more",
            key=f"{lm.KEY}.tag" if section.tag else f"{lm.KEY}.config.model_type",
        )
    if section.tag is None:
        config.bos_token_id = config.eos_token_id = eos_id
    model = lm.load(transformers.AutoModelForCausalLM, section, config)
    lm.check_sizes(model, section, vocab_size)
    lm.checkpoint_activations(model, section)
    width = model.get_input_embeddings().embedding_dim
    start = config.bos_token_id if config.bos_token_id is not None else eos_id
    return CausalDecoder(model, width, start)
