"""The typed form of a run's YAML: the sections and keys, their defaults and their units.

Every key has one meaning here and nowhere else. Where a part of the engine takes options of its
own (an optimizer, a timm model, a dataset format), they go under ``param``, ``config`` or beside
``format``, and the part's own file validates them.
"""

# ruff: noqa: RUF012 - pydantic copies a default for each section that is made
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from engine.config.section import Fraction, Names, NonNegativeInt, ProperFraction, Section


class Runner(Section):
    name: str = "plain"  # a file of engine/train/steps: plain | dga (also clip_bs, clip_bsgs)
    seed: NonNegativeInt = 0
    stable_random: Literal["none", "step"] = "step"  # no effect: replay is always on
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
    """Parameters whose name matches the regular expression; the first matching group counts."""

    pattern: str
    train: Literal["train", "freeze", "lora", "rows"] = "train"
    tokens: Names = []  # rows: of an embedding table, the rows of these tokens alone
    lr_scale: NonNegativeFloat = 1.0
    weight_decay: float | None = None
    freeze: bool = False  # the same as train: freeze


class Optim(Section):
    name: str = "torch.optim.AdamW"
    param: dict[str, Any] = {}
    lr: Lr = Lr()
    grad_clip: PositiveFloat | None = None  # by the global norm
    groups: list[ParamGroup] = []
    keys_finetune: Names = []  # if any: only parameters whose names contain one of these train
    layer_decay: Fraction = 1.0  # lr factor per layer, counted down from each tower's head


class DebiasSampling(Section):
    weights: dict[str, PositiveFloat] = {}  # dataset: weight instead of its size
    temperature: PositiveFloat = 1.0  # p ∝ weight ** (1 / temperature)
    allow_repeats: bool = False  # of a dataset that is smaller than the batch


class Resize(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class Crop(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    padding: NonNegativeInt = 0


class RandomResizeCrop(Section):
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class RandomFlip(Section):
    p: Fraction = 0.5


class AutoAug(Section):
    policy: Literal["imagenet", "cifar10", "svhn"] = "imagenet"


class ColorJitter(Section):
    brightness: NonNegativeFloat = 0.4
    contrast: NonNegativeFloat = 0.4
    saturation: NonNegativeFloat = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    p: Fraction = 1.0


class RandomErasing(Section):
    p: Fraction = 0.25
    scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.33)


class Normalize(Section):
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class TextAugment(Section):
    """Share of word pieces that training masks, replaces at random, or deletes."""

    mask: Fraction = 0.0
    random: Fraction = 0.0
    delete: Fraction = 0.0


class Transforms(Section):
    train_transforms: Names = ["random_resize_crop", "random_flip"]
    valid_transforms: Names = ["resize", "center_crop"]
    # How images are brought to the lists' size, in place of their resizes and crops. pad: whole,
    # with margins in the mean colour; crop: the middle; resize: whole, stretched.
    image_aspect_ratio: Literal["pad", "crop", "resize"] | None = None
    resize: Resize = Resize()
    resize_bicubic: Resize = Resize(interpolation="bicubic")
    center_crop: Crop = Crop()
    random_crop: Crop = Crop()
    random_resize_crop: RandomResizeCrop = RandomResizeCrop()
    random_flip: RandomFlip = RandomFlip()
    autoaug: AutoAug = AutoAug()
    color_jitter: ColorJitter = ColorJitter()
    random_erasing: RandomErasing = RandomErasing()
    normalize: Normalize = Normalize()
    text_augment: TextAugment = TextAugment()


class Labels(Section):
    """The labels of an image, and the text by which they are learned.

    A row reads ``PROMPT label, label,``. The drawn prompts and the words left out are those of NXTP
    (arXiv 2312.02142) in kind; one prompt is drawn for each sample and epoch.
    """

    source: Literal["given", "nouns"] = "given"  # by the dataset; nouns: those of its captions
    separator: str = ","  # a single token of the decoder's tokenizer
    prompt: str = "The objects in the image are"  # in evaluation and generation
    train_prompts: Names = [
        "The objects in the image are",
        "The items present in the photograph are",
        "The elements shown in the picture are",
        "The objects visible in the photograph are",
        "The items depicted in the picture are",
        "The elements seen in the image are",
        "The objects captured in the picture are",
        "The items featured in the image are",
        "The elements represented in the photograph are",
        "The objects that appear in the image are",
    ]  # one of them in training; none: the prompt above
    leave_out: Names = [
        "background", "day", "front", "illustration", "image", "ounce", "person", "photography",
        "stock",
    ]  # whole words that are not objects, of nouns alone  # fmt: skip


class Prompt(Section):
    """What precedes a caption or an answer, the same in training and generation."""

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
    # Of JPEGs; auto: simplejpeg if installed. pillow_exact: Pillow also resizes, which is slower.
    decoder: Literal["auto", "simplejpeg", "pillow", "pillow_exact"] = "auto"
    max_caption_chars: PositiveInt = 100_000  # a longer caption is a bad sample
    max_images: PositiveInt = 16  # of one sample; one with more is a bad sample
    conversations: Literal["turns", "flatten"] = "turns"  # flatten: a row per question
    prompt: Prompt = Prompt()
    labels: Labels = Labels()


class ImageEncoder(Section):
    name: str = "timm"  # a file of engine/models/image
    tag: str = "vit_base_patch16_224"
    embedding_dim: PositiveInt | None = None  # checked against the model's own width
    pretrained: bool = False
    trainable: bool = True
    image_size: PositiveInt | None = None  # default: that of the transforms
    pool: Literal["auto", "cls", "mean", "model"] = "auto"  # auto: CLS token if there is one
    patch_drop: ProperFraction = 0.0  # share of patches left out in training (FLIP)
    gradient_checkpointing: bool = False
    init: str | None = None  # a run of this engine to take this tower's weights from
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
    """From the image encoder's tokens to the decoder's input."""

    name: str = "linear"  # identity | linear | linear_no_bias | linear_norm | mlpNx_gelu
    layer: Annotated[int, Field(lt=0)] = -1  # hidden layer counted from the end; -1: after its norm
    keep_cls: bool = True  # the encoder's class token and other prefix tokens
    positions: Literal["sincos2d"] | None = None  # added to the decoder's image tokens


class Decoder(Section):
    name: str = "t5_cross"  # a file of engine/models/decoders
    tag: str | None = None  # hub id or folder; none: built from config
    config: dict[str, Any] = {}  # model_type and sizes of a model from random weights
    pretrained: bool = False
    max_length: PositiveInt = 40  # tokens of prompt and caption, special ones included
    # Of truncated alone: its blocks, and which labels of a row see each other.
    num_blocks: NonNegativeInt | None = None  # the first so many; default: all
    keep: list[NonNegativeInt] | None = None  # these instead, counted from 0
    mask: Literal["independent", "nxtp"] = "independent"  # nxtp: the rule of arXiv 2312.02142
    # per_label: each label's positions follow the prompt's; auto: so where they are independent
    positions: Literal["auto", "per_label", "sequential"] = "auto"
    image_token: str | None = None  # a token between image and text; added to the tokenizer
    gradient_checkpointing: bool = False
    tokenizer: Tokenizer = Tokenizer()


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), for groups of ``optim.groups`` with train: lora."""

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
    init: str | None = None  # a run of this engine to take all weights from


class Temperature(Section):
    name: Literal["constant", "parameter"] = "parameter"
    value: PositiveFloat = 0.02  # τ; logits are cosines / τ
    min: PositiveFloat = 0.01  # a learned τ is clamped to at least this


class NceLoss(Section):
    gather_backward: bool = True
    smoothing: ProperFraction = 0.0
    group_size: Literal[-1] | PositiveInt = -1  # ranks that share negatives; -1: all


class SigmoidLoss(Section):
    bias: float = -10.0
    scale: PositiveFloat = 10.0  # starting value, instead of 1 / temperature.value
    group_size: Literal[-1] | PositiveInt = -1  # ranks that share negatives; -1: all


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


class RecognitionEval(Section):
    """How recognised labels are scored."""

    k: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 5, 10]  # labels of an image
    encoder: str | None = None  # of sentences: a hub id, folder or CLIP, or a clip run
    label_set: str | None = None  # for mAP: a file of names, or "dataset": all that its rows have
    num_images: PositiveInt | None = None  # of each validation set; default: all
    num_examples: NonNegativeInt = 8  # in the gallery


class Eval(Section):
    epoch_interval: PositiveInt | None = 1  # epochs between evaluations in training; null: none
    zero_shot: dict[str, ZeroShotSet] = {}
    captions: CaptionEval = CaptionEval()
    recognition: RecognitionEval = RecognitionEval()
    linear_probe: LinearProbe = LinearProbe()
    shuffle_words: bool = False  # also score captions with their words shuffled
    bootstrap: PositiveInt | None = None  # draws for the 95% intervals of retrieval; null: none
    extra: Names = []  # evaluations from outside the tree, by dotted names


class Ranker(Section):
    """A contrastive model that scores how well a caption fits its image."""

    model: str | None = None  # a clip run of this engine, or a hub id or folder of a CLIP


class Generate(Section):
    """How texts are generated, in evaluations and by --mode=generate."""

    method: Literal["greedy", "beam", "sample", "best_of_n", "one_shot"] = "greedy"
    num_beams: PositiveInt = 4
    top_k: NonNegativeInt = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: PositiveFloat = 1.0
    repetition_penalty: PositiveFloat = 1.0
    length_penalty: float = 1.0
    max_new_tokens: PositiveInt | None = None  # default: what model.decoder.max_length leaves
    min_new_tokens: NonNegativeInt = 0
    num_samples: PositiveInt = 10  # best_of_n
    seed: NonNegativeInt = 0
    ranker: Ranker = Ranker()  # chooses among the samples of best_of_n
    scorer: Ranker = Ranker()  # gives CLIPScore
    answers: list[str] | str | None = None  # to questions: the likeliest of these, or of a file
    input: str | None = None  # --mode=generate: a folder of images, or a file of questions
    images: str | None = None  # the folder of the questions' images; default: that of their file
    output: str | None = None  # where the texts go; default: the run's folder
    batch_size: PositiveInt = 32
    # Of labels (--task=recognize):
    num_labels: PositiveInt = 10  # of an image
    first_tokens: PositiveInt | None = None  # one_shot: labels begun; default: num_labels
    label_rows: PositiveInt = 64  # labels of an image decoded at once
    # By the product of a label's probabilities, its perplexity, the similarity of its tokens to the
    # image's in the decoder's space, the ranker's cosine, or in the order of decoding
    rank: Literal["prob", "ppl", "sim", "clip", "none"] = "prob"
    attention: bool = False  # --mode=generate: pictures of what each label attends to


class Export(Section):
    format: str = "onnx"  # a file of engine/export: onnx, open_clip, hf
    output: str | None = None  # the folder to write; default: the run's, export/FORMAT
    opset: Annotated[int, Field(ge=18, le=23)] = 20  # of ONNX
    # Weights in files beside their graphs; auto: where they are 2 GB or more, too much for one file
    external_data: Literal["auto", "always"] = "auto"


class Config(Section):
    """A whole run. Field order is the order of printing."""

    task: str | None = None  # recorded in a run's own config.yaml; must then agree with --task
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
    options: dict[str, Any] = {}  # module from outside: its class Options

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
