"""The YAML's ``name`` is the file's name.

``find("losses", "nce")`` imports ``engine/losses/nce.py``. A file may state further names that it
answers to in ``NAMES = ("NCE",)``; those are read from its source without importing it, so that a
look-up costs one import. A dotted name (``my_project.losses.triplet``) loads a module from outside.
A part defines ``build``; a mode defines ``run``.
"""

import ast
import difflib
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import UserError

_ROOT = Path(__file__).parent
_LISTED = ("NAMES", "MODALITIES")  # constants that are read without an import
_ENTRIES = {"modes": "run"}  # the function that makes a file a part, where it is not ``build``


@functools.cache
def names(folder: str) -> dict[str, str]:
    """All names that a folder of parts answers to, each with its file's stem."""
    known: dict[str, str] = {}
    entry = _ENTRIES.get(folder, "build")
    for path in sorted((_ROOT / folder).glob("*.py")):
        if path.stem.startswith("_") or entry not in (defined := _top_level(path)):
            continue
        known[path.stem] = path.stem
        known.update(dict.fromkeys(defined.get("NAMES", ()), path.stem))
    return known


def declared(folder: str, constant: str) -> dict[str, tuple[str, ...]]:
    """What each file of parts lists as ``constant``, by its stem, without importing it."""
    files = dict.fromkeys(names(folder).values())
    return {stem: _top_level(_ROOT / folder / f"{stem}.py").get(constant, ()) for stem in files}


def _top_level(path: Path) -> dict[str, tuple[str, ...]]:
    """Names a file defines at its top level; for those in _LISTED, what they list."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(path.read_text(encoding="utf8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ()
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            listed = node.targets[0].id in _LISTED
            found[node.targets[0].id] = tuple(ast.literal_eval(node.value)) if listed else ()
    return found


def nearest(name: str, known: list[str]) -> str:
    """A hint for a message: the closest of the known names, else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def find(folder: str, name: str, *, key: str | None = None) -> ModuleType:
    """The module called ``name``. Raises UserError at ``key`` for a name that no part has."""
    known = names(folder)
    if name in known:
        return importlib.import_module(f"engine.{folder.replace('/', '.')}.{known[name]}")
    if "." in name:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"cannot import {name!r}: {error}", key=key) from error
        entry = _ENTRIES.get(folder, "build")
        if entry not in vars(module):
            raise UserError(f"module {name!r} has no function {entry!r}", key=key)
        return module
    kind = folder.rstrip("s").replace("/", " ")
    raise UserError(f"no {kind} is called {name!r}; {nearest(name, list(known))}", key=key)


def options_of(module: ModuleType, options: Mapping[str, Any]) -> dict[str, Any]:
    """``{"options": …}`` for what a module from outside builds or runs, if it has ``Options``.

    ``options`` are the configuration's. Keyword arguments, since most parts take none.
    """
    form = vars(module).get("Options")
    if form is None or module.__name__.startswith("engine."):
        return {}
    found = options.get(module.__name__, {})
    return {"options": found if isinstance(found, form) else form(**found)}


def build(
    folder: str,
    name: str,
    /,
    *arguments: Any,
    options: Mapping[str, Any],
    key: str | None = None,
    **more: Any,
) -> Any:
    """What the part called ``name`` builds from the arguments, with its own options if it has any.

    Raises UserError at ``key`` for a name that no part has.
    """
    module = find(folder, name, key=key)
    return module.build(*arguments, **more, **options_of(module, options))
