"""YAML text → plain values, each with the file and line where it is written.

The dialect is YAML as a reader means it: ``1e-4`` is a number, ``no`` is a word, only ``true`` and
``false`` are truth values, a key is written once. The one Python tag that is known is
``!!python/tuple``; no other tag is, so that nothing in a file can run code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from engine.errors import UserError

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 50

_YAML = "tag:yaml.org,2002:"
TUPLE_TAG = _YAML + "python/tuple"
NUMBER = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_SCALARS: dict[str, Callable[[str], Any]] = {
    # JSON's escapes write a character beyond 16 bits as a pair; half of one is not text
    "str": lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16"),
    "int": lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "null": lambda text: None,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A user error: the place, the dotted key, what is wrong and what to do."""

    place: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.path, self.message) if part)


@dataclass(slots=True)
class Located:
    """A value and its place; inside a dict, list or tuple every value is Located too."""

    value: Any
    place: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


_Loader.add_implicit_resolver(_YAML + "bool", _TRUTH, list("tTfF"))
_Loader.add_implicit_resolver(_YAML + "int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver(_YAML + "float", NUMBER, list("-+.0123456789"))
_Loader.add_implicit_resolver(_YAML + "null", _NULL, ["~", "n", "N", ""])


def parse(text: str, name: str, faults: list[Fault], key: tuple[str, ...] = ()) -> Located | None:
    """Parse one YAML document; None where it is empty or its value is refused.

    A place is ``name:line``, or for the text of one ``key``'s value ``name`` alone. Raises
    UserError where the text is not YAML at all; lesser faults are added to ``faults``.
    """
    reader = _Reader(name, faults, key)
    if len(text.encode("utf8", "surrogatepass")) > MAX_BYTES:
        message = f"larger than {MAX_BYTES:,} bytes; a configuration is small text"
        raise reader.error(None, message)
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.problem, error.context)))
        remedy = "indent with spaces" if "\\t" in what else "correct the line or the one above it"
        line = mark.line if mark else None
        raise reader.error(line, f"not valid YAML: {what}; {remedy}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise reader.error(line, f"not text: {error.reason}; remove the character") from error
    except RecursionError as error:
        raise reader.too_deep(None) from error
    return None if node is None else reader.value(node, key, 0)


@dataclass(slots=True)
class _Reader:
    """One walk over a document's nodes; aliases are walked each time, so the count bounds them."""

    name: str
    faults: list[Fault]
    key: tuple[str, ...]
    count: int = 0

    def place(self, line: int) -> str:
        """The place of a line, counted from 0."""
        return self.name if self.key else f"{self.name}:{line + 1}"

    def error(self, line: int | None, message: str) -> UserError:
        place = self.name if line is None else self.place(line)
        return UserError(str(Fault(place, ".".join(self.key), message)))

    def too_deep(self, line: int | None) -> UserError:
        return self.error(line, f"nested more than {MAX_DEPTH} levels deep; flatten it")

    def value(self, node: yaml.Node, path: tuple[str, ...], depth: int) -> Located | None:
        """The node's value; None where it is refused (a fault says why)."""
        self.count += 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
        if depth > MAX_DEPTH:
            raise self.too_deep(node.start_mark.line)
        if self.count > MAX_VALUES:
            message = f"more than {MAX_VALUES:,} values once aliases are filled in"
            raise self.error(node.start_mark.line, message + "; write fewer aliases")
        place, kind = self.place(node.start_mark.line), node.tag.removeprefix(_YAML)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return Located(self._mapping(node, path, depth), place)
        if isinstance(node, yaml.SequenceNode) and (kind == "seq" or node.tag == TUPLE_TAG):
            children = enumerate(node.value)
            items = [self.value(child, (*path, str(i)), depth + 1) for i, child in children]
            kept = [item for item in items if item is not None]
            return Located(kept if kind == "seq" else tuple(kept), place)
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return Located(_SCALARS[kind](node.value), place)
            except (ValueError, KeyError):
                message = f"{node.value[:40]!r} is not a valid {kind}; correct the value"
        else:
            tag = "!!" + kind if node.tag.startswith(_YAML) else node.tag
            message = f"the tag {tag} is refused here; write a plain value (or !!python/tuple)"
        self._fault(place, path, message)
        return None

    def _mapping(
        self, node: yaml.MappingNode, path: tuple[str, ...], depth: int
    ) -> dict[str, Located]:
        found: dict[str, Located] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node.start_mark.line)
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(place, path, "a list or mapping cannot be a key; write a plain name")
                continue
            key = key_node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            inner = (*path, key)
            if key == "<<":
                self._fault(place, inner, "merge keys are not read; use base: other.yaml")
            elif key in found:
                first = found[key].place
                self._fault(place, inner, f"the key is written twice, first at {first}; keep one")
            elif (value := self.value(value_node, inner, depth + 1)) is not None:
                found[key] = Located(value.value, place)
        return found

    def _fault(self, place: str, path: tuple[str, ...], message: str) -> None:
        self.faults.append(Fault(place, ".".join(path), message))


def plain(located: Located) -> Any:
    """The bare value, without places."""
    value = located.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def merge(below: Located, above: Located) -> Located:
    """Mapping into mapping, key by key; anything else above replaces what is below."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, item in above.value.items():
        merged[key] = merge(merged[key], item) if key in merged else item
    return Located(merged, above.place)


def places(located: Located, path: str = "") -> dict[str, str]:
    """Every dotted key below ``located`` with its place; list items by their index."""
    found = {path: located.place} if path else {}
    value = located.value
    if isinstance(value, list | tuple):
        value = {str(index): item for index, item in enumerate(value)}
    for key, item in value.items() if isinstance(value, dict) else ():
        found |= places(item, f"{path}.{key}" if path else key)
    return found
