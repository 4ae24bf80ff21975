"""Combinations of settings that cannot work, each in a few lines.

A rule sees valid sections only and yields violations: a message that ends with the remedy, and the
keys that it concerns, the one to point at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter

from engine.config.schema import Config, Decoder, Transforms
from engine.config.section import Section
from engine.registry import names, nearest

PARTS = {  # keys that name a file, and its folder
    "runner.name": "train/steps",
    "dist.name": "dist",
    "data.train_type": "data/samplers",
    "loss.name": "losses",
    "model.image_encoder.name": "models/image",
    "model.text_encoder.name": "models/text",
    "model.text_encoder.tokenizer.name": "data/text",
    "export.format": "export",
}


@dataclass(frozen=True, slots=True)
class Violation:
    keys: tuple[str, ...]
    message: str


def violations(config: Config) -> Iterator[Violation]:
    """Everything about ``config`` that cannot work."""
    for rule in RULES:
        yield from rule(config)


def _part_names(config: Config) -> Iterator[Violation]:
    """``name`` keys must be those of files; dotted names load code from outside, unchecked here."""
    parts = [(key, attrgetter(key)(config), folder) for key, folder in PARTS.items()]
    for name, options in config.data.datasets.items():
        if isinstance(form := options.get("format"), str):
            parts.append((f"data.datasets.{name}.format", form, "data/formats"))
    for key, name, folder in parts:
        known = list(names(folder))
        if (folder, name) != ("data/text", "auto") and known and not _is_known(name, known):
            yield Violation((key,), f"there is no {name!r}; {nearest(name, known)}")


def _transform_names(config: Config) -> Iterator[Violation]:
    fields = Transforms.model_fields.items()
    known = [name for name, field in fields if isinstance(field.default, Section)]
    known.remove("text_augment")
    for key in ("train_transforms", "valid_transforms"):
        for index, name in enumerate(getattr(config.transforms, key)):
            if not _is_known(name, known):
                path = f"transforms.{key}.{index}"
                yield Violation((path,), f"no transform is called {name!r}; {nearest(name, known)}")


def _evaluations(config: Config) -> Iterator[Violation]:
    for index, name in enumerate(config.eval.extra):
        if "." not in name:
            yield Violation(
                (f"eval.extra.{index}",),
                f"{name!r} is not the dotted name of a module; evaluations of the engine need not "
                "be named",
            )


def _is_known(name: str, known: list[str]) -> bool:
    return name in known or "." in name


def _datasets(config: Config) -> Iterator[Violation]:
    data = config.data
    for key, listed in (("train_name", data.train_name), ("valid_name", data.valid_name)):
        for index, name in enumerate(listed):
            if name in listed[:index]:
                message = f"the dataset {name!r} is listed twice; keep one"
                yield Violation((f"data.{key}.{index}",), message)
    known = sorted(set(data.train_name))
    for name in sorted(set(data.debias.weights) - set(known)):
        yield Violation(
            (f"data.debias.weights.{name}", "data.train_name"),
            f"a weight for {name!r}, which is not in data.train_name; "
            + (nearest(name, known) if known else "add it there"),
        )


def _debias(config: Config) -> Iterator[Violation]:
    data, chosen = config.data, config.data.debias
    if data.train_type == "debias" or data.train_type not in names("data/samplers"):
        return
    known = set(chosen.weights) <= set(data.train_name)  # else another rule says what is wrong
    for option, is_set in (
        ("weights", bool(chosen.weights) and known),
        ("temperature", chosen.temperature != 1.0),
    ):
        if is_set:
            yield Violation(
                (f"data.debias.{option}", "data.train_type"),
                f"data.train_type {data.train_type!r} shows every row once an epoch, whatever its "
                f"dataset: {option} has no meaning there; remove it, set data.train_type to "
                "debias, or give datasets a cap or a repeat",
            )


def _image_decoder(config: Config) -> Iterator[Violation]:
    if config.data.decoder == "simplejpeg":
        try:
            import_module("simplejpeg")
        except ImportError as error:
            yield Violation(
                ("data.decoder",),
                f"simplejpeg cannot be imported ({error}); pip install "
                "'vision-language-engine[fast]', or write auto or pillow",
            )


def _sub_batch(config: Config) -> Iterator[Violation]:
    whole, part = config.data.batch_size, config.data.batch_size_train
    if part is not None and part > whole:
        yield Violation(
            ("data.batch_size_train", "data.batch_size"),
            f"a sub-batch of {part} is larger than data.batch_size, {whole}; "
            f"give at most {whole}, or a larger data.batch_size",
        )


def _warmup(config: Config) -> Iterator[Violation]:
    lr = config.optim.lr
    if lr.warmup_steps and lr.warmup_proportion:
        yield Violation(
            ("optim.lr.warmup_steps", "optim.lr.warmup_proportion"),
            f"warm-up is given twice, as {lr.warmup_steps} steps and as a proportion of "
            f"{lr.warmup_proportion:g}; set one of them to 0",
        )


def _temperature(config: Config) -> Iterator[Violation]:
    temperature = config.loss.temperature
    if temperature.name == "parameter" and temperature.value < temperature.min:
        yield Violation(
            ("loss.temperature.value", "loss.temperature.min"),
            f"a learned temperature that starts at {temperature.value:g} is below its bound "
            f"loss.temperature.min, {temperature.min:g}; raise it or lower the bound",
        )


def _device(config: Config) -> Iterator[Violation]:
    if config.dist.device == "cpu" and config.dist.backend == "nccl":
        yield Violation(
            ("dist.backend", "dist.device"),
            "nccl needs GPUs, but dist.device is cpu; write dist.backend: gloo",
        )


def _ranges(config: Config) -> Iterator[Violation]:
    for key, most in (
        ("random_resize_crop.scale", 1.0),
        ("random_resize_crop.ratio", float("inf")),
        ("random_erasing.scale", 1.0),
    ):
        low, high = attrgetter(key)(config.transforms)
        if low > high or high > most:
            bound = "" if most == float("inf") else f", at most {most:g}"
            yield Violation(
                (f"transforms.{key}",),
                f"[{low:g}, {high:g}] is not a range; give [low, high] in order{bound}",
            )
    augment = config.transforms.text_augment
    total = augment.mask + augment.random + augment.delete
    if total > 1.0:
        yield Violation(
            ("transforms.text_augment",),
            f"mask, random and delete add up to {total:g}; give shares that sum to at most 1",
        )


def _labels(config: Config) -> Iterator[Violation]:
    """Options of labels, under a decoder that writes texts."""
    decoder, plain = config.model.decoder, Decoder()
    if decoder.name == "truncated" or "." in decoder.name:
        return
    for option in ("num_blocks", "keep", "mask", "positions", "image_token"):
        if getattr(decoder, option) != getattr(plain, option):
            yield Violation(
                (f"model.decoder.{option}", "model.decoder.name"),
                f"{option} has no effect with decoder {decoder.name!r}; leave it out, or use "
                "decoder truncated",
            )
    if config.generate.method == "one_shot":
        yield Violation(
            ("generate.method", "model.decoder.name"),
            f"one_shot finds labels, which decoder {decoder.name!r} does not write; use greedy, "
            "beam, sample or best_of_n, or decoder truncated",
        )


RULES: tuple[Callable[[Config], Iterator[Violation]], ...] = (
    _part_names,
    _transform_names,
    _evaluations,
    _datasets,
    _debias,
    _image_decoder,
    _sub_batch,
    _warmup,
    _temperature,
    _device,
    _ranges,
    _labels,
)
