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


def _sequence(dumper: yaml.SafeDumper, tag: str, items: list[Any] | tuple[Any, ...]) -> yaml.Node:
    flow = not any(isinstance(item, dict | list | tuple) and item for item in items)
    return dumper.represent_sequence(tag, items, flow_style=flow)


_Dumper.add_representer(
    list, lambda dumper, items: _sequence(dumper, "tag:yaml.org,2002:seq", items)
)
_Dumper.add_representer(tuple, lambda dumper, items: _sequence(dumper, TUPLE_TAG, items))
# text such as 1e-4, which other readers take as text, must be quoted for ours
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def resolved_yaml(config: Config) -> str:
    """Every key of ``config`` with its value, nothing inherited; ``load`` reads it back equal."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _plain(section: Section) -> dict[str, Any]:
    """Typed pairs become lists, which their type turns back; tuples in free options stay."""
    found = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        found[name] = list(value) if isinstance(value, tuple) else _inner(value)
    return found


def _inner(value: Any) -> Any:
    if isinstance(value, Section):
        return _plain(value)
    if isinstance(value, dict):
        return {key: _inner(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_inner(item) for item in value]
    return value
