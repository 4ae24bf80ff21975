"""What a run will read, in which order, and for how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import registry
from engine.config.schema import Config
from engine.data.samplers.pool import Sampler, SamplerInputs, TextLengths, num_batches
from engine.data.sources import open_dataset, row_options
from engine.data.stream.source import Stream
from engine.data.text.templates import template
from engine.errors import UserError
from engine.models.decoders import encodes_prompt
from engine.types import Source


@dataclass(frozen=True)
class Plan:
    """The training data, the sampler over it, and the number of steps. Equal on every rank.

    All of it is read by row, or all is streamed. Streams have no sampler: their readers take the
    shards in an order of their own.
    """

    sources: list[Source]
    streamed: list[Stream]
    sampler: Sampler | None
    steps_per_epoch: int
    epochs: int

    @property
    def datasets(self) -> Sequence[Source | Stream]:
        return self.streamed or self.sources

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def rows(self, step: int) -> np.ndarray:
        """The global batch of a step: int64 [n, 2] of (dataset, row)."""
        assert self.sampler is not None
        return self.sampler.batch(*divmod(step, self.steps_per_epoch))

    def name(self, dataset: int, row: int) -> str:
        """A sample as a message names it."""
        source = self.datasets[dataset]
        return f"{source.name}[{source.place(row) if isinstance(source, Stream) else row}]"


def make_plan(config: Config, world: int) -> Plan:
    """Open the training data and lay out the steps. Raises UserError for what cannot be done."""
    data, key = config.data, "data.train_name"
    if not data.train_name:
        raise UserError("data.train_name is empty: name at least one dataset", key=key)
    if data.batch_size % world:
        raise UserError(
            f"data.batch_size {data.batch_size} cannot be shared by {world} processes: "
            f"take a multiple of {world}",
            key="data.batch_size",
        )
    opened = [open_dataset(name, "train", data, key=key) for name in data.train_name]
    streams = [each for each in opened if isinstance(each, Stream)]
    sources = [each for each in opened if not isinstance(each, Stream)]
    if streams and sources:
        names = ", ".join(stream.name for stream in streams)
        raise UserError(
            f"data.train_name lists streamed datasets ({names}) beside others that are read by row;"
            " stream all of them (stream: true on shards of this machine) or none",
            key=key,
        )
    sampler = _sampler(config, sources) if sources else None
    steps = sampler.steps if sampler else _stream_steps(config, sum(map(len, streams)))
    steps = min(steps, data.train_steps or steps)
    return Plan(sources, streams, sampler, steps, config.epoch.total)


def _sampler(config: Config, sources: list[Source]) -> Sampler:
    data, key = config.data, "data.train_type"
    inputs = SamplerInputs(
        list(map(len, sources)), data.batch_size, config.runner.seed, data.train_name, data.debias,
        data.window_shards, blocks=lambda: [source.blocks for source in sources],
        texts=lambda: _texts(config, sources),
    )  # fmt: skip
    options = config.options
    return registry.build("data/samplers", data.train_type, inputs, key=key, options=options)


def _texts(config: Config, sources: list[Source]) -> TextLengths:
    """How long the texts of all rows are; answers apart, where a decoder takes them apart."""
    lengths = [source.column("length") for source in sources]
    form = template(config.data.prompt.template, key="data.prompt.template")
    if form.has("question"):
        if not encodes_prompt(config.model.decoder.name):
            return TextLengths(lengths)
        return TextLengths(lengths, [s.column("answer_length") for s in sources])
    # The decoder does not read questions: a row is as long as its answer.
    answers = [np.maximum(source.column("answer_length"), 1) for source in sources]
    signs = zip(answers, lengths, strict=True)
    return TextLengths([np.where(length < 0, -own, own) for own, length in signs])


def _stream_steps(config: Config, total: int) -> int:
    """An epoch has as many batches as the samples fill, the last one from the next pass."""
    data = config.data
    if data.train_type != "shuffle":
        raise UserError(
            f"streamed datasets have no rows for data.train_type {data.train_type!r} to choose "
            "from; set it to shuffle, or copy the shards to this machine",
            key="data.train_type",
        )
    return num_batches(total, data.batch_size)


def order_key(config: Config, plan: Plan) -> dict[str, Any]:
    """Everything that the order of samples depends on: a resumed run must agree in all of it."""
    chosen = {name: row_options(name, config.data) for name in config.data.train_name}
    conversations = config.data.conversations
    own = config.options.get(config.data.train_type)  # of a sampler from outside
    return {
        "runner.seed": config.runner.seed,
        "data.train_name": list(config.data.train_name),
        "data.train_type": config.data.train_type,
        "data.batch_size": config.data.batch_size,
        "data.train_steps": config.data.train_steps,
        "rows of each dataset": [len(dataset) for dataset in plan.datasets],
        "rows chosen of data.datasets": {n: own for n, own in chosen.items() if own} or None,
        "streamed shards": [stream.identity for stream in plan.streamed] or None,
        "data.debias": config.data.debias.model_dump(mode="json"),
        "data.window_shards and shards": plan.sampler.identity if plan.sampler else None,
        "lengths of the texts": plan.sampler.lengths_digest if plan.sampler else None,
        "data.conversations": None if conversations == "turns" else conversations,
        "options of data.train_type": own.model_dump(mode="json") if own is not None else None,
    }
