import json
import struct
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from engine.train import serial

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]


def round_trip(value, folder: Path):
    tensors, skeleton = serial.flatten(value)
    serial.write_tensors(folder / "x.safetensors", tensors, {})
    text = json.dumps(skeleton, allow_nan=False)
    return serial.unflatten(serial.read_tensors(folder / "x.safetensors"), json.loads(text))


def same(a, b) -> bool:
    """Equality that tells types, NaN bits, -0.0 and the order of keys apart."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return torch.equal(*flat)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    return a == b


@st.composite
def tensor_values(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(torch.tensor(shape).prod()) if shape else 1
    size = torch.empty((), dtype=dtype).element_size()
    raw = bytearray(draw(st.binary(min_size=count * size, max_size=count * size)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).reshape(shape)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensor_values()
)
keys = st.one_of(st.integers(), st.text(max_size=3), st.just("!"), st.booleans(), st.none())
structures = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=structures)
def test_any_structure_comes_back_bit_for_bit(value, tmp_path_factory):
    assert same(round_trip(value, tmp_path_factory.mktemp("round")), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_also_without_dimensions(dtype, tmp_path):
    one = torch.tensor([1, 0, 1]).to(dtype)
    value = {"some": one, "scalar": one[0].clone(), "none": one[:0].clone()}
    assert same(round_trip(value, tmp_path), value)


def test_layouts_that_are_not_contiguous_keep_their_values(tmp_path):
    x = torch.randn(4, 6)
    value = [
        x.t(),
        x[:, ::2],
        x[0].expand(3, 6),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    value.append(torch.view_as_complex(torch.randn(3, 2)).conj())
    got = round_trip(value, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(got, value, strict=True))


def test_a_tensor_met_twice_is_stored_once_and_is_one_again(tmp_path):
    x = torch.randn(5)
    value = {"a": x, 0: [x, x]}
    tensors, _ = serial.flatten(value)
    got = round_trip(value, tmp_path)
    assert len(tensors) == 1 and got["a"] is got[0][0] is got[0][1]


@pytest.mark.parametrize("view_first", [True, False])
def test_overlapping_views_are_stored_apart(view_first, tmp_path):
    x = torch.arange(10.0)
    views = [x[2:5], x, x.view(2, 5), x[4:]]
    value = views if view_first else views[::-1]
    assert same(round_trip(value, tmp_path), value)


def test_a_view_of_a_large_tensor_is_stored_small(tmp_path):
    round_trip(torch.zeros(100_000)[:2], tmp_path)
    assert (tmp_path / "x.safetensors").stat().st_size < 200


def test_names_that_collide_stay_apart(tmp_path):
    value = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), 1: torch.tensor(3)}
    value |= {"1": torch.tensor(4), "__metadata__": torch.tensor(5), "\ud800": torch.tensor(6)}
    assert same(round_trip(value, tmp_path), value)


def test_keys_of_ints_and_their_texts_differ(tmp_path):
    value = {1: "int", "1": "text", "!": "mark", None: "none"}
    assert same(round_trip(value, tmp_path), value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [{"b": object()}]}, "a.0.b"),
        ({"a": {(1, 2): 3}}, "a"),
        ({"a": b"bytes"}, "a"),
        ({"w": torch.eye(2).to_sparse()}, "w"),
        ({"w": torch.empty(2, device="meta")}, "w"),
        ({"w": torch.empty(2, dtype=torch.complex64, device="meta")}, "w"),
    ],
)
def test_what_cannot_be_held_is_named_by_its_place(value, place):
    with pytest.raises(TypeError, match=rf"^{place} "):
        serial.flatten(value)


@pytest.mark.parametrize("skeleton", [{"!": "code"}, {"!": "tensor", "name": "a", "dtype": "load"}])
def test_a_skeleton_that_is_none_is_refused(skeleton):
    with pytest.raises(ValueError, match="skeleton"):
        serial.unflatten({"a": torch.zeros(2)}, skeleton)


def test_tied_weights_are_written_once_and_read_under_both_names(tmp_path):
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    state = nn.ModuleDict({"embedding": embedding, "head": head}).state_dict()
    tensors, tied = serial.untie(state)
    assert tied == {"head.weight": "embedding.weight"} and list(tensors) == ["embedding.weight"]
    serial.write_tensors(tmp_path / "m.safetensors", tensors, tied)
    got = serial.read_tensors(tmp_path / "m.safetensors")
    assert got["head.weight"] is got["embedding.weight"]
    assert torch.equal(got["head.weight"], embedding.weight)


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    serial.write_tensors(path, {"a": torch.ones(2000)}, {})
    got = serial.read_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(got["a"], torch.ones(2000))


def test_the_model_file_is_readable_by_other_tools(tmp_path):
    from safetensors.torch import load_file

    serial.write_tensors(tmp_path / "m.safetensors", {"a": torch.ones(2)}, {"b": "a"})
    assert torch.equal(load_file(tmp_path / "m.safetensors")["a"], torch.ones(2))


def test_copies_are_made_unless_they_are_not_wanted():
    x = torch.zeros(3)
    copied, shared = (
        (serial.untie({"x": x}, copy=copy)[0]["x"], serial.flatten([x], copy=copy)[0]["0"])
        for copy in (True, False)
    )
    x += 1
    assert [tensor.sum() for tensor in (*copied, *shared)] == [0, 0, 3, 3]
