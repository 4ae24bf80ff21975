"""What decoders have in common: a transformers model, its head, its sizes and its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import engine.torchvision_ops  # noqa: F401  before transformers, which imports torchvision

import transformers  # isort: skip
from transformers.activations import NewGELUActivation  # isort: skip
from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import row_losses
from engine.models.pretrained import Part, vocabulary

KEY = "model.decoder"
_BEHIND_THE_HEAD = (  # what configurations call it, of Gemma, Cohere, Granite, Falcon-H1
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class Decoder(nn.Module):
    """A language model that speaks about images: subclasses say how it sees them.

    ``width`` is that of the image tokens it takes, ``start_id`` the token that a text begins with.
    Images come as ``image_MND``, the tokens of M images: row 0's, then row 1's …, ``num_images_B``
    of them (None: one each).
    """

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__()
        self.model = model
        self.width, self.start_id = width, start_id

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer."""
        layer = self.model.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def hidden(
        self,
        image_MND: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Tensor:
        """States [B, T, D] of the text, ready for the head: that at t predicts the token after."""
        raise NotImplementedError

    def label_states(
        self,
        image_MND: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        labels: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Tensor:
        """States that predict ``labels``, in the same places, ready for the head.

        Here those of the text, [B, T, D]: prompt and answer are read as one text.
        """
        return self.hidden(image_MND, input_ids_BT, attention_mask_BT, num_images_B)

    def generate(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Texts after the prompt, int64 [B · num_return_sequences, new tokens], by ``generate``.

        Prompts that the decoder continues begin with ``start_id`` and are padded on the left.
        ``options`` are those of transformers' ``generate``.
        """
        raise NotImplementedError


class AnsweringDecoder(Decoder):
    """One that can weigh several answers to a prompt without reading the prompt again."""

    def prefill(
        self,
        image_MND: Tensor,
        prompt_ids_BT: Tensor,
        prompt_mask_BT: Tensor,
        num_images_B: Tensor | None = None,
    ) -> Any:
        """What ``nll_after`` needs of images and prompts, which are those of ``generate``.

        Its ``row_bytes`` is the memory that a row of it takes beside an answer.
        """
        raise NotImplementedError

    def nll_after(
        self,
        known: Any,
        rows_R: Tensor,
        labels_RL: Tensor,
    ) -> Tensor:
        """Σ −log p [R] of answers, padded with −100; ``rows_R`` are their rows of ``known``."""
        raise NotImplementedError

    def answer_losses(self, hidden_RLD: Tensor, labels_RL: Tensor) -> Tensor:
        """Σ −log p [R] by logits in fp32 or wider, so that a model in bf16 ties no answers."""
        wide = torch.promote_types(hidden_RLD.dtype, torch.float32)
        return row_losses(hidden_RLD.to(wide), labels_RL, *self.head())


def part_of(section: Section) -> Part:
    """The decoder as a part that transformers builds."""
    return Part.of("decoder", KEY, section)


def load(auto: Any, section: Section, configuration: Any) -> Any:
    """The model of ``configuration``, with the tag's weights if ``pretrained``. UserError."""
    return _fused(part_of(section).load(auto, configuration)[0])


def _fused(model: nn.Module) -> nn.Module:
    """The model with GELU's approximation by tanh as one kernel: transformers writes out eight."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU("tanh"))
    return model


def configuration_of(
    section: Section, vocab_size: int, pad_id: int, *, encoder_decoder: bool, examples: str
) -> transformers.PretrainedConfig:
    """The decoder's configuration. Raises UserError for one of the other family."""
    part = part_of(section)
    found = part.configuration(examples, vocabulary(vocab_size, pad_id))
    if bool(found.is_encoder_decoder) != encoder_decoder:
        other = "causal" if encoder_decoder else "t5 or t5_cross"
        raise UserError(
            f"decoder {section.name!r} cannot be a {found.model_type!r} model; "
            f"known are {examples}, or set {KEY}.name: {other}",
            key=part.model_key,
        )
    return found


def check_head(config: Any, key: str) -> None:
    """Raises UserError for a model that changes its head's logits."""
    for name in _BEHIND_THE_HEAD:
        if getattr(config, name, None) not in (None, 1):
            raise UserError(
                f"a {config.model_type!r} model changes its logits after the head ({name}: "
                f"{getattr(config, name)}), which losses and probabilities would not include; take "
                "another model, or one of random weights with 1 or null there",
                key=key,
            )


def finish(model: Any, section: Section, vocab_size: int, blocks: Any = None) -> None:
    """What is left to do of a loaded model, of which ``blocks`` (default: all) is trained: check
    its sizes, and recompute its activations in backward where ``gradient_checkpointing`` asks for
    it. Raises UserError."""
    part = part_of(section)
    part.check_sizes(model, vocab_size, section.max_length)
    if section.gradient_checkpointing:
        part.checkpoint_activations(model if blocks is None else blocks)
