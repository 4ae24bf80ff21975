"""No code without a caller in the engine: what only tests use counts as unused."""

import functools
from pathlib import Path

import vulture

from tests.layers.allowed import ALLOWED

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def unused():
    """name → where and what."""
    scan = vulture.Vulture()
    scan.scavenge([ROOT / "engine", ROOT / "launch.py"])
    return {
        str(item.name): f"{item.filename.relative_to(ROOT)}:{item.first_lineno}: {item.message}"
        for item in scan.get_unused_code(min_confidence=60)
    }


def test_nothing_is_unused_but_what_is_allowed():
    """Remove it, or say in allowed.py who uses it."""
    assert {name: text for name, text in unused().items() if name not in ALLOWED} == {}


def test_what_is_allowed_is_there():
    assert ALLOWED.keys() - unused().keys() == set()
