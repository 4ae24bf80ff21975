"""What is wrong with a configuration, in words: unknown keys, wrong types, values out of bounds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticUndefined

from engine.config.schema import Config
from engine.config.section import Section, is_section, leaves
from engine.errors import UserError

Form = TypeVar("Form", bound=Section)

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (quoted where it looks like a number)",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "dict_type": "keys and values below it",
    "model_type": "keys and values below it",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
}


def explain(
    errors: Sequence[ErrorDetails], raw: Any, form: type[Section] = Config
) -> dict[tuple[str, ...], str]:
    """pydantic's errors about ``raw`` as a ``form``: a message by the path of each faulty key."""
    found: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for error in errors:
        found.setdefault(_path(error, raw), []).append(error)
    # of a union's branches the one that got deepest says most
    kept = {
        path: group
        for path, group in found.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    }
    return {path: _Key(path, raw, form).message(group) for path, group in kept.items()}


def validate(form: type[Form], values: Any, key: str) -> tuple[Form | None, dict[str, str]]:
    """The section at a dotted ``key`` that a part defines; else a message by each faulty key."""
    fields: Any = {key: (form, ...)}
    around = create_model("Section", __base__=Section, **fields)
    try:
        return getattr(around.model_validate({key: values}), key), {}
    except ValidationError as error:
        faults = explain(error.errors(include_url=False), {key: values}, around)
        return None, {".".join(path): message for path, message in faults.items()}


def validated(form: type[Form], values: Any, key: str) -> Form:
    """The section at a dotted ``key`` that a part defines. Raises UserError for its first fault."""
    found, faults = validate(form, values, key)
    if found is None:
        faulty, message = next(iter(faults.items()))
        raise UserError(message, key=faulty)
    return found


def dotted_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration by its dotted path, sections included."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        if is_section(field.annotation):
            found += dotted_keys(field.annotation, f"{prefix}{name}.")
    return found


def _path(error: ErrorDetails, raw: Any) -> tuple[str, ...]:
    """The part of the error's location that is in ``raw``: pydantic adds names of its own."""
    path: list[str] = []
    for step in error["loc"]:
        inside = (isinstance(raw, Mapping) and step in raw) or (
            isinstance(raw, list | tuple) and isinstance(step, int) and step < len(raw)
        )
        if inside:
            raw = raw[step]
        elif error["type"] == "missing" and isinstance(step, str) and step == error["loc"][-1]:
            pass  # a key that should be there
        else:
            continue
        path.append(str(step))
    return tuple(path)


@dataclass(frozen=True, slots=True)
class _Key:
    """A faulty key of ``raw``, which should be a ``form``."""

    path: tuple[str, ...]
    raw: Any
    form: type[Section]

    def message(self, group: Sequence[ErrorDetails]) -> str:
        kinds = {error["type"] for error in group}
        if kinds == {"extra_forbidden"}:
            return self._unknown()
        if kinds == {"missing"} and isinstance(group[0]["loc"][-1], str):
            above = ".".join(self.path[:-1])
            place = f"below {above}" if above else "there"
            return f"the key is missing; write {self.path[-1]}: {place}"
        wanted = " or ".join(dict.fromkeys(self._wanted(error) for error in group))
        value = self._value()
        shown = "nothing" if value is None else _shown(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"needs {wanted}, not {shown}; {self._remedy(group, value)}"

    def _unknown(self) -> str:
        key, parent = self.path[-1], ".".join(self.path[:-1])
        section = self._section(self.path[:-1])
        valid = list(section.model_fields) if section else []
        hints = []
        if close := difflib.get_close_matches(key, valid, n=1):
            hints.append(f"did you mean {close[0]!r}?")
        elsewhere = [key_ for key_ in dotted_keys(self.form) if key_.rpartition(".")[2] == key]
        if elsewhere:
            hints.append("it is a key elsewhere: " + ", ".join(elsewhere[:3]))
        if not hints:
            hints.append(f"keys of {parent or 'the file'}: " + ", ".join(sorted(valid)))
        return f"unknown key {key!r}; " + " ".join(hints)

    def _wanted(self, error: ErrorDetails) -> str:
        if error["type"] == "missing":
            return f"a list of {int(error['loc'][-1]) + 1} or more"
        if error["type"] == "value_error":
            annotation = getattr(self._field(tuple(map(str, error["loc"]))), "annotation", None)
            return "a number" if {int, float} & leaves(annotation) else "text"
        template = _WANTED.get(error["type"], "something else (" + error["msg"] + ")")
        return template.format(**error.get("ctx", {}))

    def _remedy(self, group: Sequence[ErrorDetails], value: Any) -> str:
        for error in group:
            if error["type"] == "literal_error" and isinstance(value, str):
                expected = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
                if close := difflib.get_close_matches(value, expected.split(", "), n=1):
                    return f"did you mean {close[0]!r}?"
        default = getattr(self._field(self.path), "default", PydanticUndefined)
        if default is None or default is PydanticUndefined or isinstance(default, Section):
            return "correct it or leave the key out"
        return f"correct it or leave the key out (its default is {_shown(default)})"

    def _section(self, path: Sequence[str]) -> type[Section] | None:
        """The section that declares the keys at ``path``; None where keys are free."""
        annotation: Any = self.form
        for step in path:
            if is_section(annotation):
                field = annotation.model_fields.get(step)
                annotation = field.annotation if field else None
            elif get_origin(annotation) in (dict, list):
                annotation = get_args(annotation)[-1]
            else:
                return None
        return annotation if is_section(annotation) else None

    def _field(self, path: Sequence[str]) -> Any:
        section = self._section(path[:-1])
        return section.model_fields.get(path[-1]) if section else None

    def _value(self) -> Any:
        value = self.raw
        for step in self.path:
            if isinstance(value, Mapping):
                value = value.get(step)
            elif isinstance(value, list | tuple):
                value = value[int(step)]
        return value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)
