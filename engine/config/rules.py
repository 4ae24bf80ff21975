"""Combinations of settings that cannot work, each in a few lines.

A rule sees valid sections only and yields violations: a message that ends with the remedy, and the
keys that it concerns, the one to point at first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
Violations = Iterator[tuple[str, ...]]
"""Of each a message and the keys that it concerns."""


def violations(config: Config) -> Violations:
    """Everything about ``config`` that cannot work."""
    for rule in (_part_names, _datasets, _debias, _image_decoder, _numbers, _ranges, _labels):
        yield from rule(config)


def _part_names(config: Config) -> Violations:
    """Names must be those of files; dotted names load code from outside, unchecked here."""
    parts = [(key, attrgetter(key)(config), folder) for key, folder in PARTS.items()]
    for name, options in config.data.datasets.items():
        if isinstance(form := options.get("format"), str):
            parts.append((f"data.datasets.{name}.format", form, "data/formats"))
    for key, name, folder in parts:
        known = names(folder)
        if (folder, name) != ("data/text", "auto") and known and not _is_known(name, known):
            yield f"there is no {name!r}; {nearest(name, list(known))}", key
    fields = Transforms.model_fields.items()
    transforms = [name for name, field in fields if isinstance(field.default, Section)]
    transforms.remove("text_augment")
    for key in ("train_transforms", "valid_transforms"):
        for index, name in enumerate(getattr(config.transforms, key)):
            if not _is_known(name, transforms):
                message = f"no transform is called {name!r}; {nearest(name, transforms)}"
                yield message, f"transforms.{key}.{index}"
    for index, name in enumerate(config.eval.extra):
        if "." not in name:
            yield (
                f"{name!r} is not the dotted name of a module; evaluations of the engine need not "
                "be named",
                f"eval.extra.{index}",
            )


def _is_known(name: str, known: Collection[str]) -> bool:
    return name in known or "." in name


def _datasets(config: Config) -> Violations:
    data = config.data
    for key in ("train_name", "valid_name"):
        listed = getattr(data, key)
        for index, name in enumerate(listed):
            if name in listed[:index]:
                yield f"the dataset {name!r} is listed twice; keep one", f"data.{key}.{index}"
    known = sorted(set(data.train_name))
    for name in sorted(set(data.debias.weights) - set(known)):
        remedy = nearest(name, known) if known else "add it there"
        yield (
            f"a weight for {name!r}, which is not in data.train_name; {remedy}",
            f"data.debias.weights.{name}",
            "data.train_name",
        )


def _debias(config: Config) -> Violations:
    data, chosen = config.data, config.data.debias
    if data.train_type == "debias" or data.train_type not in names("data/samplers"):
        return
    known = set(chosen.weights) <= set(data.train_name)  # else another rule says what is wrong
    is_set = {
        "weights": bool(chosen.weights) and known,
        "temperature": chosen.temperature != 1.0,
    }
    for option in filter(is_set.get, is_set):
        yield (
            f"data.train_type {data.train_type!r} shows every row once an epoch, whatever its "
            f"dataset: {option} has no meaning there; remove it, set data.train_type to "
            "debias, or give datasets a cap or a repeat",
            f"data.debias.{option}",
            "data.train_type",
        )


def _image_decoder(config: Config) -> Violations:
    if config.data.decoder == "simplejpeg":
        try:
            import_module("simplejpeg")
        except ImportError as error:
            yield (
                f"simplejpeg cannot be imported ({error}); pip install "
                "'vision-language-engine[fast]', or write auto or pillow",
                "data.decoder",
            )


def _numbers(config: Config) -> Violations:
    whole, part = config.data.batch_size, config.data.batch_size_train
    if part is not None and part > whole:
        yield (
            f"a sub-batch of {part} is larger than data.batch_size, {whole}; "
            f"give at most {whole}, or a larger data.batch_size",
            "data.batch_size_train",
            "data.batch_size",
        )
    lr = config.optim.lr
    if lr.warmup_steps and lr.warmup_proportion:
        yield (
            f"warm-up is given twice, as {lr.warmup_steps} steps and as a proportion of "
            f"{lr.warmup_proportion:g}; set one of them to 0",
            "optim.lr.warmup_steps",
            "optim.lr.warmup_proportion",
        )
    temperature = config.loss.temperature
    if temperature.name == "parameter" and temperature.value < temperature.min:
        yield (
            f"a learned temperature that starts at {temperature.value:g} is below its bound "
            f"loss.temperature.min, {temperature.min:g}; raise it or lower the bound",
            "loss.temperature.value",
            "loss.temperature.min",
        )
    if config.dist.device == "cpu" and config.dist.backend == "nccl":
        message = "nccl needs GPUs, but dist.device is cpu; write dist.backend: gloo"
        yield message, "dist.backend", "dist.device"


def _ranges(config: Config) -> Violations:
    for key, most in (
        ("random_resize_crop.scale", 1.0),
        ("random_resize_crop.ratio", float("inf")),
        ("random_erasing.scale", 1.0),
    ):
        low, high = attrgetter(key)(config.transforms)
        if low > high or high > most:
            bound = "" if most == float("inf") else f", at most {most:g}"
            message = f"[{low:g}, {high:g}] is not a range; give [low, high] in order{bound}"
            yield message, f"transforms.{key}"
    augment = config.transforms.text_augment
    total = augment.mask + augment.random + augment.delete
    if total > 1.0:
        message = f"mask, random and delete add up to {total:g}; give shares that sum to at most 1"
        yield message, "transforms.text_augment"


def _labels(config: Config) -> Violations:
    """Options of labels, under a decoder that writes texts."""
    decoder, plain = config.model.decoder, Decoder()
    if decoder.name == "truncated" or "." in decoder.name:
        return
    for option in ("num_blocks", "keep", "mask", "positions", "image_token"):
        if getattr(decoder, option) != getattr(plain, option):
            yield (
                f"{option} has no effect with decoder {decoder.name!r}; leave it out, or use "
                "decoder truncated",
                f"model.decoder.{option}",
                "model.decoder.name",
            )
    if config.generate.method == "one_shot":
        yield (
            f"one_shot finds labels, which decoder {decoder.name!r} does not write; use greedy, "
            "beam, sample or best_of_n, or decoder truncated",
            "generate.method",
            "model.decoder.name",
        )
