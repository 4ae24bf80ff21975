"""What decoders have in common: a transformers model, its input, its head and its sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from engine.config.schema import Decoder as Section
from engine.errors import UserError
from engine.losses.language_model import row_losses
from engine.models.pretrained import Part

KEY = "model.decoder"


class DecoderInput(NamedTuple):
    """Texts and their images. Prompts to be continued are padded on the left."""

    image_MND: Tensor  # tokens of M images: row 0's, then row 1's …
    ids_BT: Tensor
    mask_BT: Tensor
    num_images_B: Tensor | None = None  # of each row; None: one each


class Decoder(nn.Module):
    """A language model that speaks about images: subclasses say how it sees them.

    ``width`` is that of the image tokens it takes, ``start_id`` the token that a text begins with.
    """

    def __init__(self, model: Any, width: int, start_id: int) -> None:
        super().__init__()
        self.model, self.width, self.start_id = model, width, start_id

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output layer."""
        layer = self.model.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def hidden(self, given: DecoderInput) -> Tensor:
        """States [B, T, D] of the text, ready for the head: that at t predicts the token after."""
        raise NotImplementedError

    def label_states(self, given: DecoderInput, labels: Tensor) -> Tensor:
        """States that predict ``labels``, in the same places: here prompt and answer are one text,
        and these are its own."""
        return self.hidden(given)

    def generate(self, given: DecoderInput, **options: Any) -> Tensor:
        """Texts after prompts, int64 [B · num_return_sequences, new tokens].

        Prompts that are continued begin with ``start_id``; ``options`` are those of transformers'
        ``generate``.
        """
        raise NotImplementedError

    # --- several answers to a prompt that is read once

    def prefill(self, given: DecoderInput) -> Any:
        """What ``nll_after`` needs of images and prompts, which are those of ``generate``.

        Its ``row_bytes`` is the memory that a row of it takes beside an answer. Raises UserError
        for a decoder that cannot weigh answers.
        """
        raise UserError(
            f"a {type(self).__name__} cannot weigh answers; take t5 or causal", key=f"{KEY}.name"
        )

    def nll_after(self, known: Any, rows_R: Tensor, labels_RL: Tensor) -> Tensor:
        """Σ −log p [R] of answers, padded with −100; ``rows_R`` are their rows of ``known``."""
        raise NotImplementedError

    def answer_losses(self, hidden_RLD: Tensor, labels_RL: Tensor) -> Tensor:
        """Σ −log p [R] by logits in fp32 or wider, so that a model in bf16 ties no answers."""
        wide = torch.promote_types(hidden_RLD.dtype, torch.float32)
        return row_losses(hidden_RLD.to(wide), labels_RL, *self.head())


def part_of(section: Section) -> Part:
    """The decoder as a part that transformers builds."""
    return Part("decoder", KEY, section.tag, section.config, section.pretrained)


def load(
    auto: Any, section: Section, config: Any, vocab_size: int, *, may_grow: bool = False
) -> Any:
    """The model of ``config``, whose table may be given one more row with ``may_grow``. Raises
    UserError for weights that cannot be loaded and sizes that do not fit the section."""
    part = part_of(section)
    model, _ = part.load(auto, config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # transformers writes out eight kernels
                setattr(module, name, nn.GELU("tanh"))
    if may_grow and model.get_input_embeddings().num_embeddings == vocab_size - 1:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    part.check_sizes(model, vocab_size, section.max_length)
    if section.gradient_checkpointing:
        part.checkpoint_activations(model)
    return model
