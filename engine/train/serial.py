"""Nested tensors and JSON values, taken apart for safetensors and put together again, bit for bit.

``flatten`` turns a structure into a flat dict of tensors and a JSON skeleton that refers to them;
``unflatten`` is its inverse. What plain JSON cannot say (tuples, integer keys, NaN) is written as
an object with the key ``"!"``. Nothing is pickled, so that reading a file cannot run code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_MARK = "!"
_TIED = "tied"  # key of the file's metadata: JSON {left-out name: stored name}
_NATIVE = {  # what every release of safetensors stores; any other dtype goes as bytes
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
}


class _Pool:
    """Tensors under unique names, the very same one once, whichever views of it there are.

    Copies are on the CPU. Without them no two may overlap: safetensors refuses shared memory.
    """

    def __init__(self, copy: bool) -> None:
        self.copy = copy
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, name: str, tensor: Tensor, *, as_bytes: bool = False) -> str:
        """Stores ``tensor`` unless it is here already; the name that it is under."""
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} is a sharded tensor: gather it before it is saved")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = f"{tensor.layout}, {tensor.device}"
            raise TypeError(f"{name} is not a plain dense tensor ({kind})")
        place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        view = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if (place, view) in self._names and tensor.numel():
            return self._names[place, view]
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if self.copy:
            plain = plain.to("cpu", copy=True)
        unique, count = name, 1
        while unique in self.tensors or unique == "__metadata__":  # a word that the format reserves
            count += 1
            unique = f"{name}#{count}"
        self._names[place, view] = unique
        self.tensors[unique] = plain.reshape(-1).view(torch.uint8) if as_bytes else plain
        return unique


def flatten(value: Any, *, copy: bool = True) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a structure by name, copied to the CPU, and its JSON skeleton.

    Takes None, bool, int, float, str, lists, tuples, dicts with scalar keys, and dense tensors of
    any dtype; a tensor met twice is stored once and is one tensor again when read. Strides are not
    kept. Without ``copy`` tensors may not overlap. Raises TypeError naming the place of anything
    else.
    """
    pool = _Pool(copy)
    return pool.tensors, _take_apart(value, "", pool)


def _take_apart(value: Any, path: str, pool: _Pool) -> Any:
    """The node of ``value`` at ``path``, which is its keys with a dot before each."""
    # For people, and clean UTF-8: keys may hold anything
    place = path[1:].encode("ascii", "backslashreplace").decode() or "value"
    if isinstance(value, Tensor):
        if value.dtype in _NATIVE:
            return {_MARK: "tensor", "name": pool.add(place, value)}
        kind = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return {_MARK: "tensor", **kind, "name": pool.add(place, value, as_bytes=True)}
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {_MARK: "float", "bits": struct.pack(">d", value).hex()}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        items = [_take_apart(item, f"{path}.{i}", pool) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_MARK: "tuple", "items": items}
    if isinstance(value, Mapping):
        for key in value:
            if not (key is None or isinstance(key, bool | int | float | str)):
                raise TypeError(f"{place} has a key of type {type(key).__name__}")
        pairs = [(key, _take_apart(item, f"{path}.{key}", pool)) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return dict(pairs)
        return {_MARK: "dict", "pairs": [[_take_apart(k, path, pool), v] for k, v in pairs]}
    raise TypeError(
        f"{place} is of type {type(value).__name__}, which a checkpoint does not hold: "
        "tensors, None, bool, int, float, str, lists, tuples and dicts only"
    )


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The structure that ``flatten`` took apart. Raises ValueError for a skeleton that is none."""
    if isinstance(skeleton, list):
        return [unflatten(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match skeleton.get(_MARK):
        case None:
            return {key: unflatten(tensors, item) for key, item in skeleton.items()}
        case "float":
            return struct.unpack(">d", bytes.fromhex(skeleton["bits"]))[0]
        case "tuple":
            return tuple(unflatten(tensors, skeleton["items"]))
        case "dict":
            return {unflatten(tensors, k): unflatten(tensors, v) for k, v in skeleton["pairs"]}
        case "tensor" if "dtype" not in skeleton:
            return tensors[skeleton["name"]]
        case "tensor" if isinstance(dtype := getattr(torch, skeleton["dtype"], 0), torch.dtype):
            return tensors[skeleton["name"]].view(dtype).reshape(skeleton["shape"])
    raise ValueError(f"not part of a skeleton: {str(skeleton)[:80]}")


def untie(
    tensors: Mapping[str, Tensor], *, copy: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once by its first name, as ``flatten`` has it, and {left-out name: stored name}
    of the tied ones."""
    pool = _Pool(copy)
    stored = {name: pool.add(name, tensor) for name, tensor in tensors.items()}
    return pool.tensors, {name: kept for name, kept in stored.items() if name != kept}


def write_tensors(path: Path, tensors: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    """Writes a safetensors file that says which left-out names are tied to which stored ones."""
    # "format" is what other readers of safetensors files look for
    save_file(tensors, path, {"format": "pt"} | ({_TIED: json.dumps(tied)} if tied else {}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file on the CPU, tied names included (as one tensor).

    Raises SafetensorError or OSError for a file that is none.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        # Cloned: what comes out is a view of the mapped file, which would keep it open
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        tied = json.loads((file.metadata() or {}).get(_TIED, "{}"))
    return tensors | {name: tensors[kept] for name, kept in tied.items()}
