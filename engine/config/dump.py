"""A configuration as plain YAML, which loads to the same configuration again."""

from __future__ import annotations

from typing import Any

import yaml

from engine.config.schema import Config
from engine.config.section import Section
from engine.config.yaml_source import NUMBER, TUPLE_TAG


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # lists are indented below their key


def _sequence(dumper: yaml.SafeDumper, items: list[Any] | tuple[Any, ...]) -> yaml.Node:
    tag = TUPLE_TAG if isinstance(items, tuple) else "tag:yaml.org,2002:seq"
    flow = not any(isinstance(item, dict | list | tuple) and item for item in items)
    return dumper.represent_sequence(tag, items, flow_style=flow)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)
# text such as 1e-4, which other readers take as text, must be quoted for ours
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def resolved_yaml(config: Config) -> str:
    """Every key of ``config`` with its value, nothing inherited; ``load`` reads it back equal."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any, typed: bool = False) -> Any:
    """Typed pairs become lists, which their type turns back; tuples in free options stay."""
    if isinstance(value, Section):
        return {name: _plain(item, typed=True) for name, item in value}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list) or (typed and isinstance(value, tuple)):
        return [_plain(item) for item in value]
    return value
