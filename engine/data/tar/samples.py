"""The samples of a tar shard: members of one key put together, and a row for each that is lost.

A key is a member's path up to the first dot of its file name, as webdataset has it. Members of a
sample need not stand together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from engine.data.image_files import ENDINGS
from engine.data.tables.paths import OUTSIDE
from engine.data.tar.texts import TextForm, needs_fields, read_texts
from engine.data.tar.walk import Window, walk
from engine.types import BadSample, Place, Row

_MAX_TEXT_BYTES = 16 << 20
_OUTSIDE = re.compile(OUTSIDE)
_FAULTY = [Row()]
_NO_CAPTION = ("", "\ufeff")  # how a text begins that is empty or has a byte order mark


class Plain(NamedTuple):
    """The row of an image and its text, as most are: made in a tenth of a ``Row``'s time."""

    key: str
    offset: int
    size: int
    caption: str


# A sample's members so far: a list, since thousands are made and read in one breath.
_Group = list[Any]
_IMAGE, _TEXT, _JSON, _KEY, _OFFSET, _SIZE, _CAUSE, _DETAIL, _AGAIN = range(9)
# Stands for a key that is new; _AGAIN: the key was there before, with the same member.
_FULL: _Group = ["", b"", b"", "", -1, 0, "", "", False]


def read_samples(descriptor: int, file_size: int, form: TextForm) -> list[Plain | Row]:
    """All rows of a shard in order. Never raises for what the file holds."""
    window = Window(descriptor)
    slots = dict.fromkeys(ENDINGS, _IMAGE) | {form.text.lower(): _TEXT, "json": _JSON}
    known: dict[str, _Group] = {}
    groups: list[_Group] = []
    damages: list[tuple[int, str, str]] = []  # groups before it, cause, detail
    # What names of the sample before begin with; at first what none can begin with.
    last, length, group = "\udfff", 1, _FULL
    for name, offset, size, cause, detail in walk(window, file_size):
        slot = slots.get(name[length:]) if name.startswith(last) else None
        if slot is None:
            base = name.rfind("/") + 1
            dot = name.find(".", base) + 1
            slot = slots.get(name[dot:].lower()) if dot > base + 1 else None
            if slot is None:
                if cause and not name:
                    damages.append((len(groups), cause, detail))
                continue
            last, length = name[:dot], dot
            group = known.get(last, _FULL)
        if group[slot] is not None:
            again = group is not _FULL
            group = known[last] = [None, None, None, name[: length - 1], -1, 0, "", "", again]
            groups.append(group)
        if cause:
            _fail(group, cause, f"{name}: {detail}")
            group[slot] = b""
        elif slot == _IMAGE:
            group[_IMAGE], group[_OFFSET], group[_SIZE] = name[length:], offset, size
        elif size <= _MAX_TEXT_BYTES:
            begin = offset - window.start
            content = window.bytes[begin : begin + size]
            group[slot] = content if len(content) == size else window.read(offset, size)
        else:
            _fail(group, "too large", f"{name} has {size} bytes")
            group[slot] = b""
    return _with_damage(groups, damages, form)


def _fail(group: _Group, cause: str, detail: str) -> None:
    if not group[_CAUSE]:  # the first reason is the one that counts
        group[_CAUSE], group[_DETAIL] = cause, detail


def _with_damage(
    groups: list[_Group], damages: list[tuple[int, str, str]], form: TextForm
) -> list[Plain | Row]:
    """The rows of all groups; damage is reported by the samples that it cut, else by a row of its
    own."""
    found = [_plain_row(group, form) or _rows(group, form) for group in groups]
    for before, cause, detail in reversed(damages):
        beside = range(max(before - 1, 0), min(before + 1, len(groups)))
        cut = [i for i in beside if _cause(found[i]) == cause]
        for i in beside:
            if _cause(found[i]) and _lacks_members(groups[i]):
                found[i] = [replace(found[i][0], cause=cause, detail=detail)]  # type: ignore[type-var]
                cut.append(i)
        if not cut:
            found.insert(before, [Row(cause=cause, detail=detail)])
            groups.insert(before, _FULL)
    return [row for rows in found for row in rows]


def _cause(rows: Sequence[Plain | Row]) -> str:
    return rows[0].cause if isinstance(rows[0], Row) else ""


def _lacks_members(group: _Group) -> bool:
    image, text, fields = group[:3]
    return image is None or (text is None and fields is None)


def _plain_row(group: _Group, form: TextForm) -> list[Plain | Row] | None:
    """The row of an image and its text, with or without a JSON that says no more; else None.

    What _rows makes of it too, in a third of the time.
    """
    image, text, fields, key, offset, size, cause, _, _ = group
    if image is None or not text or cause or not key.isalnum():
        return None
    try:
        caption = text.decode().strip()
    except UnicodeDecodeError:
        return None
    if caption[:1] in _NO_CAPTION or (fields and needs_fields(caption, fields, form)):
        return None
    return [tuple.__new__(Plain, (f"{key}.{image}", offset, size, caption))]


def _rows(group: _Group, form: TextForm) -> list[Plain | Row]:
    """A row for each caption of a sample, or the one that says why it cannot be used."""
    image, text, fields, key, offset, size, cause, _, _ = group
    if not (cause or key.isalnum()) and _OUTSIDE.search(key):
        _fail(group, "outside root", "its name leads out of the shard")
    texts = _FAULTY
    if not group[_CAUSE]:
        try:
            if text is None and fields is None:
                raise BadSample("no caption", f"it has no {form.text} and no json")
            texts = read_texts(text, fields, form)
            if image is None and not texts[0].turns:
                raise BadSample("missing image", "its text is there alone")
        except BadSample as bad:
            texts = _FAULTY
            _fail(group, bad.cause, bad.detail)
            if group[_AGAIN] and _lacks_members(group):
                group[_CAUSE], group[_DETAIL] = "duplicate member", f"of a key before; {bad}"
    own: dict[str, Any] = {"key": key, "cause": group[_CAUSE], "detail": group[_DETAIL]}
    if image:
        own |= {"key": f"{key}.{image}", "images": (Place("", offset, size),)}
    return [replace(row, **own) for row in texts]
