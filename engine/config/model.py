"""The sections of a model: encoders, connector, decoder, adapters."""

# ruff: noqa: RUF012 - pydantic copies a default for each section that is made
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from engine.config.section import NonNegativeInt, ProperFraction, Section


class ImageEncoder(Section):
    name: str = "timm"  # a file of engine/models/image
    tag: str = "vit_base_patch16_224"
    embedding_dim: PositiveInt | None = None  # checked against the model's own width
    pretrained: bool = False
    trainable: bool = True
    image_size: PositiveInt | None = None  # default: what the transforms put out
    pool: Literal["auto", "cls", "mean", "model"] = "auto"  # auto: CLS token if there is one
    patch_drop: ProperFraction = 0.0  # share of patches left out in training (FLIP)
    gradient_checkpointing: bool = False
    init: str | None = None  # a run of ours to take this tower's weights from
    param: dict[str, Any] = {}  # passed to timm.create_model


class Tokenizer(Section):
    name: str = "auto"  # a file of engine/data/text; auto: the text encoder's own, else bytes
    tag: str | None = None  # hub id or folder
    vocab_size: PositiveInt = 8192  # of a BPE trained on the captions
    datasets: list[str] = []  # whose captions it is trained on; default: data.train_name


class TextEncoder(Section):
    name: str = "huggingface"  # a file of engine/models/text
    tag: str | None = None  # hub id or folder; none: built from config
    config: dict[str, Any] = {}  # model_type and sizes of a model from random weights
    embedding_dim: PositiveInt | None = None
    pretrained: bool = False
    trainable: bool = True
    max_length: PositiveInt = 25  # tokens, special ones included
    pool: Literal["first", "last", "mean"] = "first"
    gradient_checkpointing: bool = False
    init: str | None = None
    tokenizer: Tokenizer = Tokenizer()


class Projection(Section):
    dim: PositiveInt = 512


class Connector(Section):
    """From the image encoder's tokens to what the decoder takes."""

    name: str = "linear"  # identity | linear | linear_no_bias | linear_norm | mlpNx_gelu
    layer: Annotated[int, Field(lt=0)] = -1  # hidden layer counted from the end; -1: after its norm
    keep_cls: bool = True  # the encoder's class token and other prefix tokens
    positions: Literal["sincos2d"] | None = None  # added to what the decoder gets of an image


class Decoder(Section):
    name: str = "t5_cross"  # a file of engine/models/decoders
    tag: str | None = None  # hub id or folder; none: built from config
    config: dict[str, Any] = {}  # model_type and sizes of a model from random weights
    pretrained: bool = False
    max_length: PositiveInt = 40  # tokens of prompt and caption, special ones included
    # Of truncated alone: its blocks, and who sees whom of the labels that share a row.
    num_blocks: NonNegativeInt | None = None  # the first so many; default: all
    keep: list[NonNegativeInt] | None = None  # these instead, counted from 0
    mask: Literal["independent", "nxtp"] = "independent"  # nxtp: the rule of arXiv 2312.02142
    # per_label: each label stands right behind the prompt; auto: so where they are independent
    positions: Literal["auto", "per_label", "sequential"] = "auto"
    image_token: str | None = None  # a token between image and text; added to the tokenizer
    gradient_checkpointing: bool = False
    tokenizer: Tokenizer = Tokenizer()


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), where a group of ``optim.groups`` says train: lora."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    rank_stabilised: bool = False  # scale α/√r instead of α/r (arXiv 2312.03732)
    dropout: ProperFraction = 0.0


class Model(Section):
    image_encoder: ImageEncoder = ImageEncoder()
    text_encoder: TextEncoder = TextEncoder()
    projection: Projection = Projection()
    connector: Connector = Connector()
    decoder: Decoder = Decoder()
    lora: Lora = Lora()
    init: str | None = None  # a run of ours to take all weights from
