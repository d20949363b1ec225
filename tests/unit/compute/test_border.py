from __future__ import annotations

import pytest
import torch

from torrentlm.compute.border import (
    ABSENT,
    ALIGNMENT,
    DTYPES,
    Border,
    BorderShape,
    Carried,
    Logits,
    Returned,
    TensorShape,
    by_slot,
    from_wire,
    pack,
    to_dtype,
    to_wire,
    unpack,
)
from torrentlm.compute.sizes import Point, Size
from torrentlm.errors import RemoteProtocolError
from torrentlm.wire.tensors import Tensor


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


HIDDEN = TensorShape((Size("batch", 1), Size("tokens", 1), Size(offset=8)), torch.float32)
TABLE = TensorShape((Size(offset=4), Size("length", 1)), torch.int64)
MASK = TensorShape((Size("?"),), torch.float32)
SHAPE = BorderShape((Returned(0, 0), Returned(0, 1), Carried(1, (1, "mask"))), (HIDDEN, TABLE, MASK))
POINT = Point(7, 1, past=2)


def test_a_border_for_any_step() -> None:
    zeros = SHAPE.zeros(POINT, torch.bfloat16, torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in zeros.tensors] == [(7, 1, 8), (4, 3), (0,)]
    assert [tensor.dtype for tensor in zeros.tensors] == [torch.bfloat16, torch.int64, torch.bfloat16]
    SHAPE.check(zeros, POINT)
    back = from_wire(to_wire(zeros), ids=False)
    assert isinstance(back, Border) and all(map(torch.equal, back.tensors, zeros.tensors))


def changed(number: int, tensor: torch.Tensor) -> Border:
    tensors = list(SHAPE.zeros(POINT, torch.float32, torch.device("cpu")).tensors)
    tensors[number] = tensor
    return Border(tuple(tensors))


@pytest.mark.parametrize(
    "border",
    [
        Border(()),
        Border(changed(0, torch.zeros(7, 1, 8)).tensors[:2]),
        Border((*changed(0, torch.zeros(7, 1, 8)).tensors, torch.zeros(1))),
        changed(0, torch.zeros(7, 2, 8)),
        changed(0, torch.zeros(8, 1, 8)),
        changed(0, torch.zeros(7, 1, 9)),
        changed(0, torch.zeros(7, 1)),
        changed(0, torch.zeros(7, 8)),
        changed(0, torch.zeros(7, 1, 8, dtype=torch.int64)),
        changed(0, torch.zeros(7, 1, 8, dtype=torch.bool)),
        changed(0, ABSENT),
        changed(1, torch.zeros(4, 3)),
        changed(1, torch.zeros(4, 4, dtype=torch.int64)),
        changed(1, ABSENT),
        changed(2, torch.zeros(3, dtype=torch.int64)),
        changed(2, torch.zeros(3, 3)),
    ],
)
def test_a_border_of_another_shape_is_refused(border: Border) -> None:
    with pytest.raises(RemoteProtocolError, match="due"):
        SHAPE.check(border, POINT)


@pytest.mark.parametrize(
    "border",
    [
        changed(0, torch.zeros(7, 1, 8, dtype=torch.float16)),
        changed(1, torch.zeros(4, 2, dtype=torch.int64)),  # cut to a window
        changed(1, torch.zeros(4, 3, dtype=torch.int32)),
        changed(2, torch.zeros(3)),
        changed(2, ABSENT),
    ],
)
def test_what_a_model_may_make_of_it(border: Border) -> None:
    SHAPE.check(border, POINT)


def test_what_the_stem_did_without_is_none() -> None:
    hidden, table = torch.zeros(7, 1, 8), torch.zeros(4, 3, dtype=torch.int64)
    known = by_slot(SHAPE, Border((hidden, table, ABSENT)))
    assert known == {Returned(0, 0): hidden, Returned(0, 1): table, Carried(1, (1, "mask")): None}
    half = to_dtype(Border((hidden, table, ABSENT)), torch.float16, torch.device("cpu"))
    assert [tensor.dtype for tensor in half.tensors] == [torch.float16, torch.int64, torch.uint8]
    assert to_dtype(half, torch.float16, torch.device("cpu")).tensors[0] is half.tensors[0]


def test_ids_and_logits_on_the_wire() -> None:
    ids = from_wire((pack(torch.tensor([[1, 2]], dtype=torch.int32)),), ids=True)
    assert isinstance(ids, torch.Tensor) and ids.tolist() == [[1, 2]]
    for tensors in ((pack(torch.zeros(1, 2)),), (), (pack(torch.tensor([[1]])),) * 2, (pack(torch.zeros(1).bool()),)):
        with pytest.raises(RemoteProtocolError):
            from_wire(tensors, ids=True)
    assert isinstance(from_wire((pack(torch.tensor([[1, 2]])),), ids=False), Border)
    [logits] = to_wire(Logits(torch.zeros(1, 1, 3)))
    assert logits.shape == (1, 1, 3)
