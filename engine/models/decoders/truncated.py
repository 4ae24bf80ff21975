"""The first blocks of any causal language model, for labels that share a row (NXTP, 2312.02142).

A row is image, prompt, and labels each followed by a separator. The image's tokens see each other
both ways; the prompt sees them and what precedes it; a label sees image, prompt and its own tokens.
Whether a label's first token follows the prompt or the label before it, and which positions labels
stand at, the batch says. What has been read of an image and its prompt is kept once: any number of
labels is read behind it at a time, none of which sees another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from transformers import DynamicCache  # isort: skip
from engine import masks
from engine.config.model import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import token_losses
from engine.models.decoders import blocks
from engine.models.decoders import language_model as lm
from engine.models.decoders.alibi import GivenAlibi
from engine.models.decoders.language_model import Decoder
from engine.models.decoders.text_positions import TextPositions
from engine.models.pretrained import name as called


class Reading:
    """What a decoder knows of a batch: images, prompt, and what it read of labels since."""

    def __init__(
        self, cache: Any, segment_BS: Tensor, position_BS: Tensor, last_BD: Tensor, num_image: int
    ) -> None:
        self.cache, self.segment_BS, self.position_BS = cache, segment_BS, position_BS
        self.last_BD = last_BD  # state of the prompt's last token, ready for the head
        self.num_image = num_image

    def fork(self) -> Reading:
        """The same, to be gone on with while this one stays as it is; nothing is copied."""
        cache = DynamicCache([(layer.keys, layer.values) for layer in self.cache.layers])
        return Reading(cache, self.segment_BS, self.position_BS, self.last_BD, self.num_image)

    @property
    def num_read(self) -> int:
        """Tokens of image and text."""
        return self.segment_BS.shape[1]


class TruncatedDecoder(Decoder):
    """Image tokens, a prompt and labels that do not see each other."""

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__(model, width, start_id)
        self.base = [model.get_decoder()]  # in a list: its parameters have one name
        self.text_positions = TextPositions(model)
        self.alibi = GivenAlibi(self.base[0])
        self.takes_positions = "position_ids" in inspect.signature(self.base[0].forward).parameters

    def label_losses(
        self, image_BND: Tensor, batch: Mapping[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """Σ −log p of each row's learned tokens, [B], in fp32 or wider.

        ``batch`` has ``input_ids_BT``, ``attention_mask_BT``, ``segment_BT``, ``position_BT`` (0 is
        the text's first), ``source_BT`` (the place whose state tells a token; −1: it is not
        learned) and, if any, ``unseen_BT``: see ``masks.visible``.
        """
        hidden_BTD = self.hidden(image_BND, batch)
        at_BT = batch["source_BT"] >= 0
        rows_S = at_BT.nonzero()[:, 0]
        hidden_SD = hidden_BTD[rows_S, batch["source_BT"][at_BT]]
        labels_S = batch["input_ids_BT"][at_BT]
        loss_S, _ = token_losses(
            hidden_SD[None], labels_S[None], *self.head(), label_smoothing=label_smoothing
        )
        return loss_S.new_zeros(len(at_BT)).index_add(0, rows_S, loss_S)

    def hidden(self, image_BND: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """States [B, T, D] of the text, ready for the head."""
        num_image, mask_BT = image_BND.shape[1], batch["attention_mask_BT"]
        image_BN = mask_BT.new_zeros(len(mask_BT), num_image)
        unseen_BT = batch.get("unseen_BT")
        sees_BSS = masks.visible(
            torch.cat([image_BN, torch.ones_like(mask_BT)], dim=1),
            torch.cat([image_BN, batch["segment_BT"]], dim=1),
            torch.cat([torch.ones_like(image_BN), mask_BT], dim=1),
            unseen_BT=None if unseen_BT is None else torch.cat([image_BN, unseen_BT], dim=1),
        )
        embeds_BSD = self._embedded(image_BND, batch["input_ids_BT"])
        position_BS = _behind(num_image, batch["position_BT"])
        found = self._run(embeds_BSD, sees_BSS, position_BS, position_BS, num_image)
        return found.last_hidden_state[:, num_image:]

    def read(self, image_BND: Tensor, prompt_ids_P: Tensor) -> Reading:
        """Read images and the prompt that follows each of them."""
        rows, num_image = image_BND.shape[:2]
        ids_BP = prompt_ids_P.expand(rows, -1)
        embeds_BSD = self._embedded(image_BND, ids_BP)
        sees_BSS = masks.visible(
            torch.cat([ids_BP.new_zeros(rows, num_image), torch.ones_like(ids_BP)], dim=1)
        )
        position_BS = torch.arange(embeds_BSD.shape[1], device=ids_BP.device).expand(rows, -1)
        found = self._run(embeds_BSD, sees_BSS, position_BS, position_BS, num_image, DynamicCache())
        segment_BS = torch.zeros_like(position_BS)
        last_BD = found.last_hidden_state[:, -1]
        return Reading(found.past_key_values, segment_BS, position_BS, last_BD, num_image)

    def go_on(
        self, reading: Reading, ids_BK: Tensor, segment_BK: Tensor, position_BK: Tensor, **more: Any
    ) -> Any:
        """States [B, K, D] of further tokens, which ``reading`` then knows.

        Positions count from the text's first token. ``more`` is asked of transformers' model, whose
        whole output is then given.
        """
        segment_BS = torch.cat([reading.segment_BS, segment_BK], dim=1)
        ahead_BK = reading.num_image + position_BK
        position_BS = torch.cat([reading.position_BS, ahead_BK], dim=1)
        sees_BKS = masks.visible(torch.ones_like(segment_BS), segment_BS, last=segment_BK.shape[1])
        embeds_BKD = self.model.get_input_embeddings()(ids_BK)
        found = self._run(
            embeds_BKD, sees_BKS, ahead_BK, position_BS, reading.num_image, reading.cache, **more
        )
        reading.segment_BS, reading.position_BS = segment_BS, position_BS
        return found if more else found.last_hidden_state

    def log_probs(self, hidden: Tensor) -> Tensor:
        """log p [..., V] of the token that follows a state, in fp32 or wider."""
        weight_VD, bias_V = self.head()
        bias_V = None if bias_V is None else bias_V.to(hidden.dtype)
        # as the loss: logits in bf16 would be percents off, and many of them equal
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, weight_VD.to(hidden.dtype), bias_V)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _embedded(self, image_BND: Tensor, ids_BT: Tensor) -> Tensor:
        text_BTD = self.model.get_input_embeddings()(ids_BT)
        return torch.cat([image_BND.to(text_BTD.dtype), text_BTD], dim=1)

    def _run(
        self,
        embeds_BKD: Tensor,
        sees_BKS: Tensor,
        position_BK: Tensor,
        key_position_BS: Tensor,
        num_image: int,
        cache: Any = None,
        **more: Any,
    ) -> Any:
        """The model's output for embeddings at their positions, behind what ``cache`` holds."""
        if self.takes_positions:
            more["position_ids"] = position_BK
        num_image_B = position_BK.new_full((len(position_BK),), num_image)
        with ExitStack() as bent:
            bent.enter_context(self.text_positions.after(num_image_B))
            if self.alibi.is_needed:
                bent.enter_context(self.alibi.at(key_position_BS))
            return self.base[0](
                inputs_embeds=embeds_BKD,
                attention_mask=masks.additive(sees_BKS, embeds_BKD.dtype),
                past_key_values=cache,
                use_cache=cache is not None,
                **more,
            )


def _behind(num_image: int, position_BT: Tensor) -> Tensor:
    """Positions of images and texts, [B, N + T]."""
    image_N = torch.arange(num_image, device=position_BT.device)
    return torch.cat([image_N.expand(len(position_BT), -1), num_image + position_BT], dim=1)


def _check_attention(config: Any, key: str) -> None:
    """Raises UserError for a model without attention, which labels could not be hidden from."""
    if getattr(config, "num_attention_heads", None) is None:
        raise UserError(
            f"a {config.model_type!r} model has no attention by which a label is kept from "
            "seeing others; take llama, gpt2, opt, mpt or another with attention",
            key=key,
        )


def build(section: Section, *, vocab_size: int, pad_id: int, eos_id: int) -> TruncatedDecoder:
    """The decoder that ``section`` describes. Raises UserError."""
    config = lm.configuration_of(
        section, vocab_size, pad_id, encoder_decoder=False, examples="llama, gpt2, opt, mpt"
    )
    at = f"{lm.KEY}.tag" if section.tag else f"{lm.KEY}.config.model_type"
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a {config.model_type!r} model is no causal language model", key=at)
    lm.check_head(config, at)
    _check_attention(config, at)
    keep = blocks.wanted(section, config.num_hidden_layers, called(section))
    blocks.shorten(config, keep)
    if section.tag is None:
        config.bos_token_id = config.eos_token_id = eos_id
    model = lm.load(transformers.AutoModelForCausalLM, section, config)
    table = model.get_input_embeddings()
    if section.image_token is not None and table.num_embeddings == vocab_size - 1:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)  # by the token's own row
        table = model.get_input_embeddings()
    lm.check_sizes(model, section, vocab_size)
    blocks.cut(model, model.get_decoder(), keep)
    lm.checkpoint_activations(model, section)
    start = config.bos_token_id if config.bos_token_id is not None else eos_id
    decoder = TruncatedDecoder(model, table.embedding_dim, start)
    if not (decoder.takes_positions or decoder.alibi.is_needed) or getattr(config, "alibi", False):
        raise UserError(
            f"a {config.model_type!r} model counts positions by itself, and labels that share a "
            "row need their own; take llama, gpt2, opt, mpt or another with position_ids",
            key=at,
        )
    return decoder
