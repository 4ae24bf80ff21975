"""What is wrong with a configuration, in words: unknown keys, wrong types, values out of bounds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from engine.config.schema import Config
from engine.config.section import Section, is_section
from engine.errors import UserError

Form = TypeVar("Form", bound=Section)
Path = tuple[str, ...]

_WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list, such as [a, b]"),
    **dict.fromkeys(("dict_type", "model_type"), "keys and values below it"),
    "int_parsing_size": "a smaller whole number",
    "finite_number": "a finite number",
    "string_type": "text (quoted where it looks like a number)",
    "not_a_truth_value": "{wanted}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
}


def validate(form: type[Form], raw: Any) -> tuple[Form | None, dict[Path, str]]:
    """``raw`` as a ``form``; else None, and a message by the path of each faulty key."""
    found: dict[Path, list[ErrorDetails]] = {}
    try:
        return form.model_validate(raw), {}
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            found.setdefault(_path(error, raw), []).append(error)
    return None, {
        path: _message(form, path, errors)
        for path, errors in found.items()
        # of a union's branches the one that got deepest says most
        if not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    }


def validate_at(key: str, form: type[Form], values: Any) -> tuple[Form | None, dict[str, str]]:
    """The section at a dotted ``key`` that a part defines; else a message by each faulty key."""
    fields: Any = {key: (form, ...)}
    around, faults = validate(create_model("Section", __base__=Section, **fields), {key: values})
    return getattr(around, key, None), {".".join(path): text for path, text in faults.items()}


def validated(form: type[Form], values: Any, key: str) -> Form:
    """The section at a dotted ``key`` that a part defines. Raises UserError for its first fault."""
    found, faults = validate_at(key, form, values)
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


def _path(error: ErrorDetails, raw: Any) -> Path:
    """The part of the error's location that is in ``raw``: pydantic adds names of its own."""
    path: list[str] = []
    for step in error["loc"]:
        inside = (isinstance(raw, Mapping) and step in raw) or (
            isinstance(raw, list | tuple) and isinstance(step, int) and step < len(raw)
        )
        if inside:
            raw = raw[step]
        elif error["type"] != "missing" or isinstance(step, int) or step != error["loc"][-1]:
            continue  # nor is it a key that should be there
        path.append(str(step))
    return tuple(path)


def _message(form: type[Section], path: Path, errors: Sequence[ErrorDetails]) -> str:
    kinds = {error["type"] for error in errors}
    if kinds == {"extra_forbidden"}:
        return _unknown(form, path)
    if kinds == {"missing"} and isinstance(errors[0]["loc"][-1], str):
        place = f"below {'.'.join(path[:-1])}" if path[1:] else "there"
        return f"the key is missing; write {path[-1]}: {place}"
    wanted = " or ".join(dict.fromkeys(map(_wanted, errors)))
    value = errors[0]["input"]
    shown = "nothing" if value is None else _shown(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"needs {wanted}, not {shown}; {_remedy(form, path, errors)}"


def _unknown(form: type[Section], path: Path) -> str:
    *above, key = path
    valid = list(_fields(form, above))
    hints = []
    if close := difflib.get_close_matches(key, valid, n=1):
        hints.append(f"did you mean {close[0]!r}?")
    if elsewhere := [name for name in dotted_keys(form) if name.rpartition(".")[2] == key]:
        hints.append("it is a key elsewhere: " + ", ".join(elsewhere[:3]))
    if not hints:
        hints.append(f"keys of {'.'.join(above) or 'the file'}: " + ", ".join(sorted(valid)))
    return f"unknown key {key!r}; " + " ".join(hints)


def _wanted(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return f"a list of {int(error['loc'][-1]) + 1} or more"
    template = _WANTED.get(error["type"], "something else (" + error["msg"] + ")")
    return template.format(**error.get("ctx", {}))


def _remedy(form: type[Section], path: Path, errors: Sequence[ErrorDetails]) -> str:
    for error in errors:
        if error["type"] == "literal_error" and isinstance(error["input"], str):
            expected = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            if close := difflib.get_close_matches(error["input"], expected.split(", "), n=1):
                return f"did you mean {close[0]!r}?"
    field = _fields(form, path[:-1]).get(path[-1])
    if not field or field.default in (None, PydanticUndefined) or is_section(field.annotation):
        return "correct it or leave the key out"
    return f"correct it or leave the key out (its default is {_shown(field.default)})"


def _fields(form: type[Section], path: Sequence[str]) -> dict[str, FieldInfo]:
    """The fields of the section at ``path``; none where keys are free."""
    annotation: Any = form
    for step in path:
        if is_section(annotation):
            field = annotation.model_fields.get(step)
            annotation = field.annotation if field else None
        elif get_origin(annotation) in (dict, list):
            annotation = get_args(annotation)[-1]
    return annotation.model_fields if is_section(annotation) else {}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)
