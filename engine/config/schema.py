"""The typed form of a run's YAML: the sections and keys, their defaults and their units.

Every key has one meaning here and nowhere else. Where a part of the engine takes options of its
own (an optimizer, a timm model, a dataset format), they go under ``param``, ``config`` or beside
``format``, and the part's own file validates them.
"""

# ruff: noqa: RUF012 - pydantic copies a default for each section that is made
from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from engine.config.export import Export
from engine.config.generation import Generate
from engine.config.model import (  # noqa: F401  all sections are known by this module
    Connector,
    Decoder,
    ImageEncoder,
    Lora,
    Model,
    Projection,
    TextEncoder,
    Tokenizer,
)
from engine.config.recognition import Labels, RecognitionEval
from engine.config.section import Fraction, Names, NonNegativeInt, ProperFraction, Section
from engine.config.transforms import Transforms


class Runner(Section):
    name: str = "plain"  # a file of engine/train/steps: plain | dga (also clip_bs, clip_bsgs)
    seed: NonNegativeInt = 0
    stable_random: Literal["none", "step"] = "step"  # accepted; randomness is always replayed
    keep_graphs: Literal["auto"] | NonNegativeInt = "auto"  # dga: graphs of the last N sub-batches
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a NaN or infinite loss
    compile: bool = False


class Epoch(Section):
    total: PositiveInt = 1


class Dist(Section):
    name: str = "torch"  # a file of engine/dist that wraps the model
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    timeout_seconds: PositiveFloat = 600.0
    num_threads: PositiveInt | None = None  # of torch in each process
    param: dict[str, Any] = {}


class Log(Section):
    step_interval: PositiveInt = 10  # steps between two progress lines where there is no terminal
    tensorboard: bool = True


class Wandb(Section):
    enable: bool = False
    project: str = "vision-language"
    entity: str | None = None
    name: str | None = None  # default: the experiment's name
    mode: Literal["online", "offline"] = "online"
    tags: Names = []


class Ckpt(Section):
    dir: str = "./output"
    step_interval: PositiveInt = 2000  # a save every so many steps, and at each end of an epoch
    keep_last: PositiveInt = 2
    best_metric: str | None = None  # coco/RSUM, or RSUM of any; default: the task's usual figure
    auto_resume: bool = True
    resume: str | None = None  # a run's folder, or one of its checkpoints


class Lr(Section):
    name: str = "cosine_schedule_with_warmup"  # a function of engine/train/schedules.py
    init: PositiveFloat = 1e-4
    warmup_proportion: Fraction = 0.0  # of all steps
    warmup_steps: NonNegativeInt | None = None  # instead of the proportion
    param: dict[str, Any] = {}


class ParamGroup(Section):
    """Parameters whose name the regular expression finds; the first group that matches rules."""

    pattern: str
    train: Literal["train", "freeze", "lora", "rows"] = "train"
    tokens: Names = []  # rows: of a table of tokens, those of these alone
    lr_scale: NonNegativeFloat = 1.0
    weight_decay: float | None = None
    freeze: bool = False  # the same as train: freeze


class Optim(Section):
    name: str = "torch.optim.AdamW"
    param: dict[str, Any] = {}
    lr: Lr = Lr()
    grad_clip: PositiveFloat | None = None  # by the global norm
    groups: list[ParamGroup] = []
    keys_finetune: Names = []  # if any: only parameters with one of these in their names train
    layer_decay: Fraction = 1.0  # lr factor a layer, counted down from each tower's head


class DebiasSampling(Section):
    weights: dict[str, PositiveFloat] = {}  # dataset: weight instead of its size
    temperature: PositiveFloat = 1.0  # p ∝ weight ** (1 / temperature)
    allow_repeats: bool = False  # of a dataset smaller than the batch


class Prompt(Section):
    """What stands before a caption or an answer, the same in training and generation."""

    template: str = "plain"  # of engine/data/text/templates.yaml; a file FILE.yaml; or a text
    instruction: str = ""
    tokenize: Literal["clean", "reference"] = "clean"  # reference: an end token before each image


class Data(Section):
    exp_name: str | None = None
    data_path: str = "./data"
    datasets: dict[str, dict[str, Any]] = {}  # name: {format, root, …}; else data_path/name as CSV
    train_name: Names = []
    valid_name: Names = []
    train_type: str = "shuffle"  # a file of engine/data/samplers
    window_shards: PositiveInt = 16  # mixed at a time, of train_type shards+window
    train_steps: PositiveInt | None = None  # bound on an epoch's steps
    valid_steps: PositiveInt | None = None  # bound on an evaluation's batches
    batch_size: PositiveInt = 256  # global: all devices and all sub-batches
    batch_size_train: PositiveInt | None = None  # dga: global size of a sub-batch
    batch_size_val: PositiveInt = 256
    num_workers: NonNegativeInt | None = None  # a process; default by the machine's cores
    debias: DebiasSampling = DebiasSampling()
    max_bad_fraction: Fraction = 0.01  # of the samples read
    max_image_pixels: PositiveInt = 178_956_970  # Pillow's bound for a decompression bomb
    # Of JPEGs; auto: simplejpeg if it is installed. pillow_exact: Pillow resizes, too, at a price.
    decoder: Literal["auto", "simplejpeg", "pillow", "pillow_exact"] = "auto"
    max_caption_chars: PositiveInt = 100_000  # a longer caption is a bad sample
    max_images: PositiveInt = 16  # of one sample; one with more is a bad sample
    conversations: Literal["turns", "flatten"] = "turns"  # flatten: every question a row of its own
    prompt: Prompt = Prompt()
    labels: Labels = Labels()


class Temperature(Section):
    name: Literal["constant", "parameter"] = "parameter"
    value: PositiveFloat = 0.02  # τ; logits are cosines / τ
    min: PositiveFloat = 0.01  # a learned τ is clamped to at least this


class NceLoss(Section):
    gather_backward: bool = True
    smoothing: ProperFraction = 0.0
    group_size: int = -1  # ranks that share negatives; -1: all


class SigmoidLoss(Section):
    bias: float = -10.0
    scale: PositiveFloat = 10.0  # starting value, instead of 1 / temperature.value
    group_size: int = -1  # ranks that share negatives; -1: all


class Mixup(Section):
    beta: PositiveFloat = 0.1
    modality: Literal["coin", "both"] = "coin"
    partner: Literal["reversed", "random"] = "reversed"


class LanguageModelLoss(Section):
    label_smoothing: ProperFraction = 0.0


class Loss(Section):
    name: str = "NCE"  # a file of engine/losses: NCE | MixUpNCE | Sigmoid | MixUpSigmoid
    temperature: Temperature = Temperature()
    nce_loss: NceLoss = NceLoss()
    sigmoid_loss: SigmoidLoss = SigmoidLoss()
    mixup: Mixup = Mixup()
    language_model: LanguageModelLoss = LanguageModelLoss()
    gather: Literal["all", "ring"] = "all"
    tile_size: PositiveInt | None = None  # rows of a similarity tile; default by the device


class CaptionEval(Section):
    num_images: PositiveInt | None = None  # of each validation set; default: all
    num_examples: NonNegativeInt = 8  # in the gallery


class ZeroShotSet(Section):
    """A set of labelled images for zero-shot classification or a linear probe."""

    dataset: str  # a name of data.datasets
    classes: str  # JSON or text file of class names
    templates: str | None = None  # file of prompt templates with {}


class LinearProbe(Section):
    train: str | None = None
    valid: str | None = None
    method: Literal["lbfgs", "sgd", "lars"] = "lbfgs"
    epochs: PositiveInt = 90
    lr: PositiveFloat = 0.1
    batch_size: PositiveInt = 1024
    regularisation: list[PositiveFloat] = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]


class Eval(Section):
    epoch_interval: PositiveInt | None = 1  # epochs between evaluations in training; null: none
    zero_shot: dict[str, ZeroShotSet] = {}
    captions: CaptionEval = CaptionEval()
    recognition: RecognitionEval = RecognitionEval()
    linear_probe: LinearProbe = LinearProbe()
    shuffle_words: bool = False  # also score captions with their words shuffled


class Config(Section):
    """A whole run. Field order is the order of printing."""

    runner: Runner = Runner()
    epoch: Epoch = Epoch()
    dist: Dist = Dist()
    log: Log = Log()
    wandb: Wandb = Wandb()
    ckpt: Ckpt = Ckpt()
    optim: Optim = Optim()
    data: Data = Data()
    transforms: Transforms = Transforms()
    model: Model = Model()
    loss: Loss = Loss()
    eval: Eval = Eval()
    generate: Generate = Generate()
    export: Export = Export()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("epoch"), int):
            values = {**values, "epoch": {"total": values["epoch"]}}
        if isinstance(values, dict) and "input" in values:
            generate = values.get("generate") or {}
            values = {**values, "generate": {**generate, "input": values["input"]}}
            del values["input"]
        return values
