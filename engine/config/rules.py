"""Combinations of settings that cannot work, each in a few lines.

A rule looks at valid sections only and yields what is broken: the keys that it concerns, the one
to point at first, and a message that ends with the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from engine.config.schema import Config, Decoder
from engine.config.section import Section
from engine.config.transforms import Transforms
from engine.registry import names, nearest


@dataclass(frozen=True, slots=True)
class Broken:
    keys: tuple[str, ...]
    message: str


def broken(config: Config) -> Iterator[Broken]:
    """Everything about ``config`` that cannot work."""
    for rule in RULES:
        yield from rule(config)


def _part_names(config: Config) -> Iterator[Broken]:
    """``name`` keys must be those of files; dotted names load code from outside, unchecked here."""
    parts = [
        ("runner.name", config.runner.name, "train/steps"),
        ("dist.name", config.dist.name, "dist"),
        ("data.train_type", config.data.train_type, "data/samplers"),
        ("loss.name", config.loss.name, "losses"),
        ("model.image_encoder.name", config.model.image_encoder.name, "models/image"),
        ("model.text_encoder.name", config.model.text_encoder.name, "models/text"),
        ("export.format", config.export.format, "export"),
    ]
    tokenizer = config.model.text_encoder.tokenizer.name
    if tokenizer != "auto":
        parts.append(("model.text_encoder.tokenizer.name", tokenizer, "data/text"))
    for name, options in config.data.datasets.items():
        if isinstance(form := options.get("format"), str):
            parts.append((f"data.datasets.{name}.format", form, "data/formats"))
    for key, name, folder in parts:
        known = list(names(folder))
        if known and name not in known and "." not in name:
            yield Broken((key,), f"there is no {name!r}; {nearest(name, known)}")


def _transform_names(config: Config) -> Iterator[Broken]:
    fields = Transforms.model_fields.items()
    known = [name for name, field in fields if isinstance(field.default, Section)]
    known.remove("text_augment")
    for key in ("train_transforms", "valid_transforms"):
        for index, name in enumerate(getattr(config.transforms, key)):
            if name not in known and "." not in name:
                path = f"transforms.{key}.{index}"
                yield Broken((path,), f"no transform is called {name!r}; {nearest(name, known)}")


def _datasets(config: Config) -> Iterator[Broken]:
    data = config.data
    for key, listed in (("train_name", data.train_name), ("valid_name", data.valid_name)):
        for index, name in enumerate(listed):
            if name in listed[:index]:
                yield Broken(
                    (f"data.{key}.{index}",), f"the dataset {name!r} is listed twice; keep one"
                )
    for name in data.debias.weights:
        if name not in data.train_name:
            yield Broken(
                (f"data.debias.weights.{name}", "data.train_name"),
                f"a weight for {name!r}, which is not in data.train_name; "
                + (
                    nearest(name, sorted(set(data.train_name)))
                    if data.train_name
                    else "add it there"
                ),
            )


def _debias(config: Config) -> Iterator[Broken]:
    data, chosen = config.data, config.data.debias
    if data.train_type == "debias" or data.train_type not in names("data/samplers"):
        return
    known = set(chosen.weights) <= set(data.train_name)  # else another rule says what is wrong
    for option, is_set in (
        ("weights", bool(chosen.weights) and known),
        ("temperature", chosen.temperature != 1.0),
    ):
        if is_set:
            yield Broken(
                (f"data.debias.{option}", "data.train_type"),
                f"data.train_type {data.train_type!r} shows every row once an epoch, whatever its "
                f"dataset: {option} has no meaning there; remove it, set data.train_type to "
                "debias, or give datasets a cap or a repeat",
            )


def _decoder(config: Config) -> Iterator[Broken]:
    if config.data.decoder == "simplejpeg":
        try:
            import_module("simplejpeg")
        except ImportError as error:
            yield Broken(
                ("data.decoder",),
                f"simplejpeg cannot be imported ({error}); pip install "
                "'vision-language-engine[fast]', or write auto or pillow",
            )


def _sub_batch(config: Config) -> Iterator[Broken]:
    whole, part = config.data.batch_size, config.data.batch_size_train
    if part is not None and part > whole:
        yield Broken(
            ("data.batch_size_train", "data.batch_size"),
            f"a sub-batch of {part} is larger than data.batch_size, {whole}; "
            f"give at most {whole}, or a larger data.batch_size",
        )


def _warmup(config: Config) -> Iterator[Broken]:
    lr = config.optim.lr
    if lr.warmup_steps and lr.warmup_proportion:
        yield Broken(
            ("optim.lr.warmup_steps", "optim.lr.warmup_proportion"),
            f"warm-up is given twice, as {lr.warmup_steps} steps and as a proportion of "
            f"{lr.warmup_proportion:g}; set one of them to 0",
        )


def _temperature(config: Config) -> Iterator[Broken]:
    loss = config.loss
    lowest = loss.temperature.min
    if loss.temperature.name == "parameter" and loss.temperature.value < lowest:
        yield Broken(
            ("loss.temperature.value", "loss.temperature.min"),
            f"a learned temperature that starts at {loss.temperature.value:g} is below its bound "
            f"loss.temperature.min, {lowest:g}; raise it or lower the bound",
        )
    sizes = {"nce_loss": loss.nce_loss.group_size, "sigmoid_loss": loss.sigmoid_loss.group_size}
    for options, size in sizes.items():
        if size != -1 and size < 1:
            yield Broken(
                (f"loss.{options}.group_size",),
                f"{size} is no number of ranks; give -1 for all, or ≥ 1",
            )


def _device(config: Config) -> Iterator[Broken]:
    if config.dist.device == "cpu" and config.dist.backend == "nccl":
        yield Broken(
            ("dist.backend", "dist.device"),
            "nccl needs GPUs, but dist.device is cpu; write dist.backend: gloo",
        )


def _ranges(config: Config) -> Iterator[Broken]:
    transforms = config.transforms
    for key, (low, high), most in (
        ("random_resize_crop.scale", transforms.random_resize_crop.scale, 1.0),
        ("random_resize_crop.ratio", transforms.random_resize_crop.ratio, float("inf")),
        ("random_erasing.scale", transforms.random_erasing.scale, 1.0),
    ):
        if low > high or high > most:
            bound = "" if most == float("inf") else f", at most {most:g}"
            yield Broken(
                (f"transforms.{key}",),
                f"[{low:g}, {high:g}] is no range; give [low, high] in order{bound}",
            )
    augment = transforms.text_augment
    total = augment.mask + augment.random + augment.delete
    if total > 1.0:
        yield Broken(
            ("transforms.text_augment",),
            f"mask, random and delete come to {total:g}; give shares that sum to at most 1",
        )


def _labels(config: Config) -> Iterator[Broken]:
    """What is for labels alone, where the decoder speaks texts."""
    decoder, plain = config.model.decoder, Decoder()
    if decoder.name == "truncated" or "." in decoder.name:
        return
    for option in ("num_blocks", "keep", "mask", "positions", "image_token"):
        if getattr(decoder, option) != getattr(plain, option):
            yield Broken(
                (f"model.decoder.{option}", "model.decoder.name"),
                f"{option} says nothing to decoder {decoder.name!r}; leave it out, or take "
                "decoder truncated",
            )
    if config.generate.method == "one_shot":
        yield Broken(
            ("generate.method", "model.decoder.name"),
            f"one_shot finds labels, which decoder {decoder.name!r} does not speak; take greedy, "
            "beam, sample or best_of_n, or decoder truncated",
        )


RULES: tuple[Callable[[Config], Iterator[Broken]], ...] = (
    _part_names,
    _transform_names,
    _datasets,
    _debias,
    _decoder,
    _sub_batch,
    _warmup,
    _temperature,
    _device,
    _ranges,
    _labels,
)
