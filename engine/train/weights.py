"""Files of weights: which are not opened, and what is there instead."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import UserError

_PICKLED_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".distcp"}
_ZIP, _PICKLE = b"PK\x03\x04", re.compile(rb"\x80[\x02-\x05]")


def what_is_there(path: Path) -> str:
    """What the nearest folder above holds, for a message."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"in {folder} there is: {', '.join(names[:10]) or 'nothing'}{more}"


def refuse_pickle(path: Path, key: str | None) -> None:
    """Raises UserError for a pickled file, by its name or content, and for none of safetensors."""
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with its header's length, whose bytes may look like a pickle's
    is_safetensors = head[8:9] == b"{"
    magic = head.startswith(_ZIP) or _PICKLE.match(head) is not None
    if path.suffix.lower() in _PICKLED_SUFFIXES or (magic and not is_safetensors):
        raise UserError(refusal(path), key=key)
    if not is_safetensors:
        raise UserError(f"{path} is not a safetensors file", key=key)


def refusal(path: Path) -> str:
    """Why a pickled file is not opened, and how to convert it."""
    convert = (
        "import sys, torch, safetensors.torch as s; "
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "w = w.get('state_dict', w); "
        "s.save_file({k: v.clone() for k, v in w.items()}, sys.argv[2])"
    )
    return (
        f"{path} is a pickled file, which is refused because reading one can run code that is "
        "hidden in it. If it holds a model's weights and you trust where it comes from, convert "
        f'it once: python -c "{convert}" {path.name} {path.stem}.safetensors'
    )
