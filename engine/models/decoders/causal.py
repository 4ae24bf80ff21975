"""Any causal language model with images as a prefix (GIT, arXiv 2205.14100).

Image tokens see each other both ways and none of the text; text sees the images and what precedes
it. Positions that are computed (RoPE, ALiBi) count the image's tokens; learned ones are kept for
the text, which begins at the first of them, so that an image takes none of a short table away.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from transformers import DynamicCache  # isort: skip
from engine import masks
from engine.config.model import Decoder as Section
from engine.errors import UserError
from engine.models.decoders import language_model as lm
from engine.models.decoders.language_model import AnsweringDecoder, TextDecoder
from engine.models.decoders.splice import side_by_side
from engine.models.decoders.text_positions import TextPositions


class Known(NamedTuple):
    """Images and prompts, all but each prompt's last token read; rows are padded on the left."""

    cache: Any  # transformers'
    valid_BS: Tensor  # of what is read and the last token
    last_B1: Tensor
    num_image_B: Tensor  # tokens of images

    @property
    def row_bytes(self) -> int:
        """Keys and values of all layers."""
        return sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in self.cache.layers)


class CausalDecoder(TextDecoder, AnsweringDecoder):
    """Image tokens before the text."""

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__(model, width, start_id)
        self.base = [model.get_decoder()]  # in a list: its parameters have one name
        self.text_positions = TextPositions(model)
        self.takes_positions = "position_ids" in inspect.signature(self.base[0].forward).parameters

    def hidden(
        self,
        image_MND: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Tensor:
        """States [B, T, D] of the text, ready for the head."""
        embeds_BSD, seen_BN = self._embedded(image_MND, input_ids_BT, num_images_B)
        num_prefix = seen_BN.shape[1]
        mask = masks.prefix(num_prefix, attention_mask_BT, embeds_BSD.dtype, seen_BN)
        # behind a text's end the count goes on: a position for each, whatever the padding
        counted_BS = torch.cat([seen_BN, torch.ones_like(attention_mask_BT)], dim=1)
        found = self._run(embeds_BSD, mask, _positions(counted_BS), seen_BN.sum(1))
        return found.last_hidden_state[:, num_prefix:]

    def _embedded(
        self, image_MND: Tensor, ids_BT: Tensor, num_images_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Images, padded on the left, and text behind them; which of the images' places count."""
        text_BTD = self.model.get_input_embeddings()(ids_BT)
        if num_images_B is None:
            image_BND, seen_BN = image_MND, ids_BT.new_ones(image_MND.shape[:2])
        else:
            image_BND, seen_BN = side_by_side(image_MND, num_images_B)
        return torch.cat([image_BND.to(text_BTD.dtype), text_BTD], dim=1), seen_BN

    def _run(
        self,
        embeds_BSD: Tensor,
        mask: Tensor,
        position_BS: Tensor,
        num_image_B: Tensor,
        cache: Any = None,
        *,
        use_cache: bool = False,
    ) -> Any:
        options = {"position_ids": position_BS} if self.takes_positions else {}
        with self.text_positions.after(num_image_B):
            return self.base[0](
                inputs_embeds=embeds_BSD,
                attention_mask=mask,
                use_cache=use_cache,
                past_key_values=cache,
                **options,
            )

    def condition(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Known:
        """Keys and values of images and prompts up to each prompt's last token."""
        embeds_BSD, seen_BN = self._embedded(image_MND, prompt_ids_BT, num_images_B)
        valid_BS = torch.cat([seen_BN, prompt_mask_BT], dim=1)
        causal_BS = torch.cat([torch.zeros_like(seen_BN), torch.ones_like(prompt_mask_BT)], dim=1)
        # nothing between an image and its text: positions that count distances would count it
        order_BS = valid_BS.argsort(dim=1, stable=True)
        valid_BS, causal_BS = valid_BS.gather(1, order_BS), causal_BS.gather(1, order_BS)
        embeds_BSD = embeds_BSD.gather(1, order_BS[..., None].expand_as(embeds_BSD))
        cache, num_image_B = DynamicCache(), seen_BN.sum(1)
        if valid_BS.shape[1] > 1:
            sees_BSS = masks.visible(causal_BS[:, :-1], valid_BT=valid_BS[:, :-1])
            cache = self._run(
                embeds_BSD[:, :-1],
                masks.additive(sees_BSS, embeds_BSD.dtype),
                _positions(valid_BS)[:, :-1],
                num_image_B,
                cache,
                use_cache=True,
            ).past_key_values
        return Known(cache, valid_BS, prompt_ids_BT[:, -1:], num_image_B)

    def nll_after(
        self,
        known: Known,
        rows_R: Tensor,
        labels_RL: Tensor,
    ) -> Tensor:
        """Σ −log p [R] of answers, padded with −100; ``rows_R`` are their rows of ``known``."""
        cache = DynamicCache(
            [(layer.keys[rows_R], layer.values[rows_R]) for layer in known.cache.layers]
        )
        said_RL = torch.cat([known.last_B1[rows_R], labels_RL[:, :-1].clamp_min(0)], dim=1)
        embeds_RLD = self.model.get_input_embeddings()(said_RL)
        read_RS = known.valid_BS[rows_R, :-1]
        valid_RS = torch.cat([read_RS, torch.ones_like(said_RL)], dim=1)
        # what was read is there for all alike; a step of time for each token of the answer
        causal_RS = torch.cat([torch.zeros_like(read_RS), torch.ones_like(said_RL)], dim=1)
        num_read = read_RS.shape[1]
        sees_RLS = masks.visible(causal_RS, valid_BT=valid_RS)[:, num_read:]
        hidden_RLD = self._run(
            embeds_RLD,
            masks.additive(sees_RLS, embeds_RLD.dtype),
            _positions(valid_RS)[:, num_read:],
            known.num_image_B[rows_R],
            cache,
            use_cache=True,
        ).last_hidden_state
        return self.answer_losses(hidden_RLD, labels_RL)

    def generate(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Texts after the prompt, int64 [B · num_return_sequences, new tokens].

        transformers sees the prompt's last token only: ``repetition_penalty`` is for new tokens.
        """
        known = self.condition(image_MND, prompt_ids_BT, prompt_mask_BT, num_images_B)
        copies = options.get("num_beams", 1)
        if options.get("do_sample"):
            copies *= options.get("num_return_sequences", 1)
        if copies > 1:  # generate repeats the prompts, not the cache
            known.cache.batch_repeat_interleave(copies)
        with self.text_positions.after(known.num_image_B.repeat_interleave(copies)):
            found = self.model.generate(
                known.last_B1,
                attention_mask=known.valid_BS,
                past_key_values=known.cache,
                **({"use_cache": True} | options),  # which MPT does not by default
            )
        return found[:, 1:]


def _positions(counts_BS: Tensor) -> Tensor:
    """Of what counts its number in the row, from 0 on."""
    return (counts_BS.cumsum(1) - 1).clamp_min(0)


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> CausalDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = lm.configuration_of(
        section, vocab_size, pad_id, encoder_decoder=False,
        examples="gpt2, opt, llama, mpt",
    )  # fmt: skip
    at = f"{lm.KEY}.tag" if section.tag else f"{lm.KEY}.config.model_type"
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"a {config.model_type!r} model is no causal language model; known are gpt2, opt, "
            "llama, mpt and more",
            key=at,
        )
    lm.check_head(config, at)
    if section.tag is None:
        config.bos_token_id = config.eos_token_id = eos_id
    model = lm.load(transformers.AutoModelForCausalLM, section, config)
    lm.check_sizes(model, section, vocab_size)
    lm.checkpoint_activations(model, section)
    width = model.get_input_embeddings().embedding_dim
    start = config.bos_token_id if config.bos_token_id is not None else eos_id
    return CausalDecoder(model, width, start)
