"""Any causal language model with images as a prefix (GIT, arXiv 2205.14100).

Image tokens see each other both ways and none of the text; text sees the images and what precedes
it. Positions that are computed (RoPE, ALiBi) count the image's tokens; learned ones are kept for
the text, which begins at the first of them, so that an image takes none of a short table away.

With ``label_mask`` a row is one image, a prompt, and labels each followed by a separator (NXTP,
arXiv 2312.02142): a label sees image, prompt and its own tokens. Whether a label's first token
follows the prompt or the label before it, and which positions labels have, the batch says. The keys
and values of an image and its prompt are kept once: any number of labels is read behind them at a
time, none of which sees another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from engine import masks
from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import token_losses
from engine.models.decoders import language_model as lm
from engine.models.decoders.language_model import Decoder, DecoderInput
from engine.models.pretrained import vocabulary

_LEARNED = ("embed_positions", "wpe")  # names of tables of positions: OPT and the like, GPT-2
_BEHIND_THE_HEAD = (  # what configurations call it, of Gemma, Cohere, Granite, Falcon-H1
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


@dataclass(slots=True)
class KVState:
    """What a decoder has read of a batch: images, prompts, and tokens since; padded on the left."""

    cache: Any  # transformers': keys and values of each layer
    valid_BS: Tensor  # 0 for padding
    segment_BS: Tensor
    position_BS: Tensor
    num_image_B: Tensor  # tokens of images
    num_image: int  # the same with padding
    last_BD: Tensor  # state of the last prompt token that was read, ready for the head

    def take(self, rows: Tensor | slice) -> KVState:
        """A copy of these rows; of a slice nothing is copied."""
        layers = [(layer.keys[rows], layer.values[rows]) for layer in self.cache.layers]
        return KVState(
            DynamicCache(layers), self.valid_BS[rows], self.segment_BS[rows],
            self.position_BS[rows], self.num_image_B[rows], self.num_image, self.last_BD[rows],
        )  # fmt: skip

    def fork(self) -> KVState:
        """A state to extend while this one stays as it is."""
        return self.take(slice(None))

    @property
    def num_text(self) -> int:
        """Tokens of text that were read: where rows have no padding, the next one's position."""
        return self.segment_BS.shape[1] - self.num_image


class Prefilled(NamedTuple):
    """Images and prompts, of which each prompt's last token is not read yet."""

    state: KVState
    last_B1: Tensor  # that token

    @property
    def row_bytes(self) -> int:
        """Keys and values of all layers."""
        layers = self.state.cache.layers
        return sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in layers)


class PrefixDecoder(Decoder):
    """Image tokens before the text; with ``label_mask`` before labels that do not see each other.

    Without it MPT's ALiBi counts places in a row; with it labels have positions of their own.
    """

    def __init__(self, model: Any, eos_id: int, label_mask: bool = False) -> None:
        start, width = model.config.bos_token_id, model.get_input_embeddings().embedding_dim
        super().__init__(model, width, eos_id if start is None else start)
        self.label_mask = label_mask
        self.base = [model.get_decoder()]  # in a list: its parameters have one name
        self.positions = GivenPositions(model, self.base[0])

    # --- whole texts

    def hidden(self, given: DecoderInput) -> Tensor:
        embeds_BSD, image_BN = self._embedded(given)
        mask = masks.prefix(image_BN, given.mask_BT, embeds_BSD.dtype)
        # padding behind a text has positions too
        counted_BS = torch.cat([image_BN, torch.ones_like(given.mask_BT)], dim=1)
        found = self.run(embeds_BSD, mask, _count(counted_BS), image_BN.sum(1))
        return found.last_hidden_state[:, image_BN.shape[1] :]

    def label_hidden(self, image_BND: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """States [B, T, D] of the texts that ``label_losses`` takes, ready for the head."""
        given = DecoderInput(image_BND, batch["input_ids_BT"], batch["attention_mask_BT"])
        embeds_BSD, image_BN = self._embedded(given)
        mask = masks.prefix(
            image_BN, given.mask_BT, embeds_BSD.dtype,
            segment_BT=batch["segment_BT"], unseen_BT=batch.get("unseen_BT"),
        )  # fmt: skip
        num_image = image_BN.shape[1]
        position_BS = torch.cat([_count(image_BN), num_image + batch["position_BT"]], dim=1)
        found = self.run(embeds_BSD, mask, position_BS, image_BN.sum(1), key_position=position_BS)
        return found.last_hidden_state[:, num_image:]

    def label_losses(
        self, image_BND: Tensor, batch: Mapping[str, Tensor], label_smoothing: float = 0.0
    ) -> Tensor:
        """Σ −log p of each row's learned tokens, [B], in fp32 or wider.

        ``batch`` has ``input_ids_BT``, ``attention_mask_BT``, ``segment_BT``, ``position_BT`` (0 is
        the text's first), ``source_BT`` (the place whose state predicts a token; −1: it is not
        learned) and, if any, ``unseen_BT``: see ``masks.visible``.
        """
        hidden_BTD = self.label_hidden(image_BND, batch)
        at_BT = batch["source_BT"] >= 0
        rows_S = at_BT.nonzero()[:, 0]
        hidden_SD = hidden_BTD[rows_S, batch["source_BT"][at_BT]]
        labels_S = batch["input_ids_BT"][at_BT]
        loss_S, _ = token_losses(
            hidden_SD[None], labels_S[None], *self.head(), label_smoothing=label_smoothing
        )
        return loss_S.new_zeros(len(at_BT)).index_add(0, rows_S, loss_S)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """log p [..., V] of the token that follows a state, by logits in fp32 or wider."""
        weight_VD, bias_V = self.head()
        # logits in bf16 would be percents off, and many of them equal
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias_V = None if bias_V is None else bias_V.to(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), weight_VD.to(wide), bias_V).log_softmax(-1)

    # --- texts in parts, over a cache

    def encode_prompt(self, image_BND: Tensor, prompt_ids_P: Tensor) -> KVState:
        """Read images and the prompt that follows each of them."""
        ids_BP = prompt_ids_P.expand(len(image_BND), -1)
        return self._read(DecoderInput(image_BND, ids_BP, torch.ones_like(ids_BP)), num_left=0)

    def prefill(self, given: DecoderInput) -> Prefilled:
        """Keys and values of images and prompts up to each prompt's last token."""
        return Prefilled(self._read(given, num_left=1), given.ids_BT[:, -1:])

    def _read(self, given: DecoderInput, *, num_left: int) -> KVState:
        """Read images and prompts but for the ``num_left`` last tokens."""
        embeds_BSD, image_BN = self._embedded(given)
        valid_BS = torch.cat([image_BN, given.mask_BT], dim=1)
        causal_BS = torch.cat([torch.zeros_like(image_BN), torch.ones_like(given.mask_BT)], dim=1)
        # nothing between an image and its text: positions that count distances would count it
        order_BS = valid_BS.argsort(dim=1, stable=True)[:, : valid_BS.shape[1] - num_left]
        valid_BS, causal_BS = valid_BS.gather(1, order_BS), causal_BS.gather(1, order_BS)
        width = embeds_BSD.shape[2]
        embeds_BSD = embeds_BSD.gather(1, order_BS[..., None].expand(-1, -1, width))
        position_BS, num_image_B = _count(valid_BS), image_BN.sum(1)
        cache, last_BD = DynamicCache(), embeds_BSD.new_zeros(len(valid_BS), width)
        if valid_BS.shape[1]:
            mask = masks.additive(masks.visible(causal_BS, valid_BT=valid_BS), embeds_BSD.dtype)
            found = self.run(
                embeds_BSD, mask, position_BS, num_image_B, cache,
                key_position=self._keys(position_BS),
            )  # fmt: skip
            cache, last_BD = found.past_key_values, found.last_hidden_state[:, -1]
        segment_BS, num_image = torch.zeros_like(valid_BS), image_BN.shape[1]
        return KVState(cache, valid_BS, segment_BS, position_BS, num_image_B, num_image, last_BD)

    def extend(
        self, state: KVState, ids_BK: Tensor, segment_BK: Tensor, position_BK: Tensor, **more: Any
    ) -> Any:
        """States [B, K, D] of further tokens, which ``state`` then contains.

        Positions count from the text's first token. ``more`` goes to transformers' model, whose
        whole output is then returned.
        """
        new_BK = torch.ones_like(segment_BK)
        valid_BS = torch.cat([state.valid_BS, new_BK], dim=1)
        segment_BS = torch.cat([state.segment_BS, segment_BK], dim=1)
        ahead_BK = state.num_image_B[:, None] + position_BK
        position_BS = torch.cat([state.position_BS, ahead_BK], dim=1)
        sees_BKS = masks.visible(torch.ones_like(segment_BS), segment_BS, last=new_BK.shape[1])
        sees_BKS = sees_BKS & valid_BS.bool()[:, None, :]
        embeds_BKD = self.model.get_input_embeddings()(ids_BK)
        found = self.run(
            embeds_BKD, masks.additive(sees_BKS, embeds_BKD.dtype), ahead_BK, state.num_image_B,
            state.cache, key_position=self._keys(position_BS), **more,
        )  # fmt: skip
        state.valid_BS, state.segment_BS, state.position_BS = valid_BS, segment_BS, position_BS
        return found if more else found.last_hidden_state

    def nll_after(self, known: Prefilled, rows_R: Tensor, labels_RL: Tensor) -> Tensor:
        state = known.state.take(rows_R)
        ids_RL = torch.cat([known.last_B1[rows_R], labels_RL[:, :-1].clamp_min(0)], dim=1)
        first_R = state.valid_BS.sum(1) - state.num_image_B
        position_RL = first_R[:, None] + torch.arange(ids_RL.shape[1], device=ids_RL.device)
        hidden_RLD = self.extend(state, ids_RL, torch.zeros_like(ids_RL), position_RL)
        return self.answer_losses(hidden_RLD, labels_RL)

    def generate(self, given: DecoderInput, **options: Any) -> Tensor:
        """transformers sees a prompt's last token only: ``repetition_penalty`` is for new ones."""
        state, last_B1 = self.prefill(given)
        copies = options.get("num_beams", 1)
        if options.get("do_sample"):
            copies *= options.get("num_return_sequences", 1)
        if copies > 1:  # generate repeats the prompts, not the cache
            state.cache.batch_repeat_interleave(copies)
        with self.positions.at(state.num_image_B.repeat_interleave(copies)):
            found = self.model.generate(
                last_B1,
                attention_mask=torch.cat([state.valid_BS, torch.ones_like(last_B1)], dim=1),
                past_key_values=state.cache,
                **({"use_cache": True} | options),  # which MPT does not by default
            )
        return found[:, 1:]

    # --- one pass

    def _embedded(self, given: DecoderInput) -> tuple[Tensor, Tensor]:
        """Images, padded on the left, and text behind them; which of the images' places count."""
        text_BTD = self.model.get_input_embeddings()(given.ids_BT)
        image_BND = given.image_MND
        if given.num_images_B is None:
            image_BN = given.ids_BT.new_ones(image_BND.shape[:2])
        else:
            image_BND, image_BN = side_by_side(image_BND, given.num_images_B)
        return torch.cat([image_BND.to(text_BTD.dtype), text_BTD], dim=1), image_BN

    def _keys(self, position_BS: Tensor) -> Tensor | None:
        """What MPT's ALiBi is given: in a text it counts places, and gets the same."""
        return position_BS if self.label_mask else None

    def run(
        self,
        embeds_BKD: Tensor,
        mask_B1KS: Tensor,
        position_BK: Tensor,
        num_image_B: Tensor,
        cache: Any = None,
        *,
        key_position: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """transformers' output for embeddings at their positions, behind what ``cache`` holds.

        ``key_position`` [B, S] is that of all keys, for MPT; without it MPT counts places.
        """
        if self.positions.takes_ids:
            more["position_ids"] = position_BK
        with self.positions.at(num_image_B, key_position):
            return self.base[0](
                inputs_embeds=embeds_BKD,
                attention_mask=mask_B1KS,
                past_key_values=cache,
                use_cache=cache is not None,
                **more,
            )


def _count(valid_BS: Tensor) -> Tensor:
    """The number of each valid place in its row, from 0 on."""
    return (valid_BS.cumsum(1) - 1).clamp_min(0)


def side_by_side(image_MND: Tensor, num_images_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's images in turn, padded on the left: [B, K · N, D], and their mask [B, K · N]."""
    most = int(num_images_B.max())
    if (total := int(num_images_B.sum())) != len(image_MND):
        raise ValueError(f"the rows have {total} images, but {len(image_MND)} came")
    there_BK = torch.arange(most, device=image_MND.device) >= (most - num_images_B)[:, None]
    image_BKND = image_MND.new_zeros(*there_BK.shape, *image_MND.shape[1:])
    image_BKND[there_BK] = image_MND
    return image_BKND.flatten(1, 2), there_BK.long().repeat_interleave(image_MND.shape[1], 1)


class GivenPositions:
    """Learned positions for text alone, and ALiBi (arXiv 2108.12409) by the positions of keys.

    Learned: behind images of N tokens, position N is the text's 0. Image tokens get no position:
    they keep the order that the image encoder gave them. A table keeps its name and weights; its
    output is changed within ``at`` alone.

    ALiBi, of MPT: the bias of a head is its slope times the key's position, since softmax does not
    change with a constant.
    """

    def __init__(self, model: Any, base: Any) -> None:
        self.num_image_B: Tensor | None = None  # None: tables are as they were
        self.key_position_BS: Tensor | None = None  # None: MPT counts places
        self.takes_ids = "position_ids" in inspect.signature(base.forward).parameters
        self.tables = [
            module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in _LEARNED and isinstance(module, nn.Embedding)
        ]
        for table in self.tables:
            table.forward = self._of_text(table.forward)  # type: ignore[method-assign]
        self.has_alibi = hasattr(base, "build_mpt_alibi_tensor")
        if self.has_alibi:
            base.build_mpt_alibi_tensor = self._biases(base.build_mpt_alibi_tensor)

    @contextmanager
    def at(self, num_image_B: Tensor, key_position_BS: Tensor | None = None) -> Iterator[None]:
        """Within the block, positions are counted behind each row's number of image tokens, and
        MPT's keys have ``key_position_BS``."""
        self.num_image_B, self.key_position_BS = num_image_B, key_position_BS
        try:
            yield
        finally:
            self.num_image_B = self.key_position_BS = None

    def _of_text(self, forward: Any) -> Callable[..., Tensor]:
        signature = inspect.signature(forward)
        takes = signature.parameters
        name = "position_ids" if "position_ids" in takes else next(iter(takes))

        def look_up(*args: Any, **kwargs: Any) -> Tensor:
            if self.num_image_B is None:
                return forward(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            position_BT = bound.arguments[name] - self.num_image_B[:, None]
            bound.arguments[name] = position_BT.clamp_min(0)
            found_BTD = forward(*bound.args, **bound.kwargs)
            return found_BTD * (position_BT >= 0).unsqueeze(-1).to(found_BTD.dtype)

        return look_up

    def _biases(self, plain: Any) -> Callable[..., Any]:
        def biases(num_heads: int, length: int, **options: Any) -> Any:
            if self.key_position_BS is None:
                return plain(num_heads, length, **options)
            two_H12 = plain(num_heads, 2, **options)
            slope_H1 = two_H12[..., 1] - two_H12[..., 0]
            return _Biases(slope_H1[..., None] * self.key_position_BS[:, None, None])

        return biases


class _Biases:
    """Biases [B, H, 1, S] in place of MPT's [H, 1, S], which are the same for all rows.

    MPT's layers cut theirs to the lengths that they meet, by arithmetic that torch.export cannot
    follow; these have their length already.
    """

    def __init__(self, bias_BH1S: Tensor) -> None:
        self.bias_BH1S, self.shape = bias_BH1S, bias_BH1S.shape[1:]

    def size(self, axis: int) -> int:
        return 1

    def __getitem__(self, part: Any) -> Tensor:
        return self.bias_BH1S


# --- construction, for causal and truncated


def configuration(section: Section, vocab_size: int, pad_id: int, eos_id: int) -> Any:
    """A causal model's configuration. Raises UserError for one of another kind."""
    part = lm.part_of(section)
    config: Any = part.configuration("gpt2, opt, llama, mpt", vocabulary(vocab_size, pad_id))
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not causal:
        raise UserError(
            f"decoder {section.name!r} cannot be a {config.model_type!r} model, but a causal "
            f"language model (gpt2, opt, llama, mpt and more); {lm.KEY}.name: t5 and t5_cross "
            "take others",
            key=part.model_key,
        )
    for name in _BEHIND_THE_HEAD:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"a {config.model_type!r} model changes its logits after the head ({name}: "
                f"{getattr(config, name)}), which losses and probabilities would not include; take "
                "another model, or one of random weights with 1 or null there",
                key=part.model_key,
            )
    if section.tag is None:
        config.bos_token_id = config.eos_token_id = eos_id
    return config
