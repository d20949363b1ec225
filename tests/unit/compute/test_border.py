from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.compute.border import (
    ALIGNMENT,
    DTYPES,
    Border,
    BorderShape,
    Logits,
    flatten,
    from_wire,
    pack,
    replace_at,
    shape_of,
    tensors_at,
    to_wire,
    unpack,
)
from torrentlm.errors import RemoteProtocolError, UnsupportedModelError
from torrentlm.wire.tensors import Tensor

leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=3), st.just("tensor"))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)


def with_tensors(value: Any, made: list[torch.Tensor]) -> Any:
    if value == "tensor":
        made.append(torch.full((2,), float(len(made))))
        return made[-1]
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(item, made) for item in value)
    if isinstance(value, dict):
        return {key: with_tensors(item, made) for key, item in value.items()}
    return value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one is other
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@given(values)
def test_any_return_value_survives_the_journey(value: Any) -> None:
    value = with_tensors(value, [])
    border = Border.of(value)
    tree = msgpack.unpackb(msgpack.packb(border.tree))
    assert tree == border.tree
    assert same(value, Border(border.tensors, tree).value)


def test_what_cannot_travel_is_refused() -> None:
    deep: Any = torch.zeros(1)
    for _ in range(20):
        deep = (deep,)
    for value in (object(), {1: torch.zeros(1)}, deep):
        with pytest.raises(UnsupportedModelError):
            flatten(value)


def test_tensors_are_found_and_replaced_in_a_call() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    call = ((one, 3), {"pair": (two, None), "cache": object()})
    assert [place for place, _ in tensors_at(call)] == [(0, 0), (1, "pair", 0)]
    new = torch.full((1,), 2.0)
    changed = replace_at(call, {(1, "pair", 0): new})
    assert changed[1]["pair"][0] is new and changed[0][0] is one and changed[1]["cache"] is call[1]["cache"]
    assert call[1]["pair"][0] is two


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_packs_to_its_bytes(name: str) -> None:
    tensor = torch.arange(6).remainder(2).to(DTYPES[name]).view(2, 3)
    packed = pack(tensor)
    assert (packed.dtype, packed.shape, len(packed.data)) == (name, (2, 3), 6 * tensor.itemsize)
    shifted = bytearray(8) + bytearray(packed.data)
    for data in (packed.data, bytes(packed.data), memoryview(shifted)[8:]):
        back = unpack(Tensor(name, (2, 3), data))
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert back.data_ptr() % ALIGNMENT == 0
    assert torch.equal(unpack(pack(tensor.t())), tensor.t())
    assert unpack(pack(tensor[:0])).shape == (0, 3)


def test_packing_copies_nothing() -> None:
    tensor = torch.zeros(4)
    packed = pack(tensor)
    tensor[0] = 1.0
    assert bytes(packed.data[:4]) == b"\x00\x00\x80\x3f"


def test_bytes_that_do_not_fit_are_refused() -> None:
    for packed in [
        Tensor("F32", (2,), bytes(7)),
        Tensor("F32", (-1, -2), bytes(8)),
        Tensor("F8_E4M3", (8,), bytes(8)),
        Tensor("F32", (2**40,), b""),
    ]:
        with pytest.raises(RemoteProtocolError):
            unpack(packed)
    assert unpack(Tensor("BOOL", (3,), b"\x00\x01\x7f")).tolist() == [False, True, True]


def shape_seen(batch: int, tokens: int) -> BorderShape:
    value = (torch.zeros(batch, tokens, 8), None, torch.zeros(4, tokens, dtype=torch.int64))
    return shape_of(*flatten(value))


def test_a_shape_for_all_sizes_from_two() -> None:
    shape = BorderShape.between(shape_seen(2, 3), (2, 3), shape_seen(3, 5), (3, 5))
    zeros = shape.at(7, 1).zeros(torch.bfloat16, torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in zeros.tensors] == [(7, 1, 8), (4, 1)]
    assert [tensor.dtype for tensor in zeros.tensors] == [torch.bfloat16, torch.int64]
    shape.at(7, 1).check(zeros)
    with pytest.raises(RemoteProtocolError):
        shape.at(7, 2).check(zeros)
    assert shape.tokens_of(zeros) == 1
    assert isinstance(from_wire(*to_wire(zeros), shape.at(7, 1)), Border)
    with pytest.raises(RemoteProtocolError):
        from_wire(to_wire(zeros)[0][:1], zeros.tree, shape.at(7, 1))


def test_growth_by_another_rule_is_refused() -> None:
    small, large = shape_of([torch.zeros(6, 8)], None), shape_of([torch.zeros(15, 8)], None)
    with pytest.raises(UnsupportedModelError):
        BorderShape.between(small, (2, 3), large, (3, 5))
    with pytest.raises(UnsupportedModelError):
        BorderShape.between(small, (2, 3), small, (3, 5))


def test_ids_and_logits_on_the_wire() -> None:
    ids = from_wire((pack(torch.tensor([[1, 2]], dtype=torch.int32)),), None, None)
    assert isinstance(ids, torch.Tensor) and ids.tolist() == [[1, 2]]
    with pytest.raises(RemoteProtocolError):
        from_wire((pack(torch.zeros(1, 2)),), None, None)
    with pytest.raises(RemoteProtocolError):
        from_wire((), None, None)
    tensors, tree = to_wire(Logits(torch.zeros(1, 1, 3)))
    assert tensors[0].shape == (1, 1, 3) and tree is None
