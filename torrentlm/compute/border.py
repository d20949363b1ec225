"""Borders: what travels from one span to the next, as tensors in an order that every holder works out for itself.

``to_wire`` and ``from_wire`` turn them into what a message carries and back; nothing but tensors ever travels.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torrentlm.compute.sizes import Point, Size
from torrentlm.compute.values import Place
from torrentlm.errors import RemoteProtocolError
from torrentlm.wire.tensors import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGNMENT = 64  # bytes; torch's own allocations on the CPU


ABSENT = torch.empty(0, dtype=torch.uint8)
"""Travels where a model passes None this time: a mask that masks nothing."""


@dataclass(frozen=True, slots=True)
class Returned:
    """Tensor ``index`` of what layer call ``call`` returns."""

    call: int
    index: int


@dataclass(frozen=True, slots=True)
class Carried:
    """What the stem makes from the token ids for an argument of a layer call, and for other calls if they get the same:
    named after the first call that gets it, and the argument's place.
    """

    call: int
    place: Place


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The token ids themselves, where a later part of the model reads them."""


Slot = Returned | Carried | TokenIds
"""What one tensor of a border is."""


@dataclass(frozen=True, slots=True)
class Border:
    """The tensors of a border, in the order of its ``BorderShape.slots``."""

    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Logits:
    """float [batch, n, vocabulary]: of the last position, of all, or (after a step of no tokens) of none. Where a model
    has no output projection, the last hidden states instead.
    """

    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor at every size of step. A floating point dtype stands for any such, another for any without a point: a
    mask may be made of either."""

    sizes: tuple[Size, ...]
    dtype: torch.dtype

    def at(self, point: Point) -> tuple[int | None, ...]:
        """The shape at known sizes; None where it follows no rule."""
        return tuple(size.at(point) for size in self.sizes)

    def allows(self, shape: tuple[int, ...], point: Point) -> bool:
        """Whether a tensor of this shape may come with a step at ``point``."""
        return len(shape) == len(self.sizes) and all(
            size.allows(got, point) for size, got in zip(self.sizes, shape, strict=True)
        )


@dataclass(frozen=True)
class BorderShape:
    """What a border consists of."""

    slots: tuple[Slot, ...]
    tensors: tuple[TensorShape, ...]

    def check(self, border: Border, point: Point) -> None:
        """Raise RemoteProtocolError unless a peer's border has these tensors for a step at ``point``."""
        if len(border.tensors) != len(self.tensors):
            raise RemoteProtocolError(f"The peer sent {len(border.tensors)} tensors where {len(self.tensors)} are due.")
        for tensor, due, slot in zip(border.tensors, self.tensors, self.slots, strict=True):
            if isinstance(slot, Carried) and _is_absent(tensor):
                continue
            fits = tensor.dtype.is_floating_point == due.dtype.is_floating_point
            if not fits or not due.allows(tuple(tensor.shape), point):
                raise RemoteProtocolError(
                    f"The peer sent {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} where"
                    f" {DTYPE_NAMES[due.dtype]} {[-1 if size is None else size for size in due.at(point)]} is due."
                )

    def zeros(self, point: Point, dtype: torch.dtype, device: torch.device) -> Border:
        """A border of these known sizes, its floating point tensors in ``dtype``."""
        return Border(tuple(blank(tensor, point, dtype, device) for tensor in self.tensors))


def blank(shape: TensorShape, point: Point, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of that shape; nothing along an axis that follows no rule."""
    kind = dtype if shape.dtype.is_floating_point else shape.dtype
    return torch.zeros([size or 0 for size in shape.at(point)], dtype=kind, device=device)


def pack(tensor: torch.Tensor) -> Tensor:
    """A tensor as it travels, a view of a contiguous one on the CPU: leave it unchanged until the bytes are sent."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return Tensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


def unpack(packed: Tensor) -> torch.Tensor:
    """The tensor that a peer sent, if possible a view of the message; RemoteProtocolError if its parts do not fit."""
    dtype = DTYPES.get(packed.dtype)
    if dtype is None:
        raise RemoteProtocolError(f"The peer sent a tensor of dtype {packed.dtype}, which nothing here computes with.")
    count = math.prod(packed.shape)
    if min(packed.shape, default=0) < 0 or count * dtype.itemsize != len(packed.data):
        raise RemoteProtocolError(f"The peer sent {len(packed.data)} bytes for {packed.dtype} {list(packed.shape)}.")
    if count == 0:
        return torch.empty(packed.shape, dtype=dtype)
    if dtype is torch.bool:  # any other byte than 0 and 1 would be undefined behaviour in torch
        return view_of(packed.data, torch.uint8, count).ne(0).view(packed.shape)
    return aligned(view_of(packed.data, dtype, count)).view(packed.shape)


def to_wire(result: Border | Logits) -> tuple[Tensor, ...]:
    """A forward's result as the tensors of a message."""
    if isinstance(result, Logits):
        return (pack(result.logits),)
    return tuple(pack(tensor) for tensor in result.tensors)


def from_wire(tensors: Sequence[Tensor], *, ids: bool) -> torch.Tensor | Border:
    """What a step brought, for ``SpanRunner.forward``: token ids where its span has the stem, else a border.

    Raises RemoteProtocolError for what is not ids, or a tensor whose parts do not fit.
    """
    if not ids:
        return Border(tuple(unpack(tensor) for tensor in tensors))
    if len(tensors) != 1 or tensors[0].dtype not in ("I32", "I64"):
        raise RemoteProtocolError("A step for the stem brings one tensor of token ids.")
    return unpack(tensors[0])


def view_of(
    data: bytes | bytearray | memoryview | mmap.mmap, dtype: torch.dtype, count: int, offset: int = 0
) -> torch.Tensor:
    """A flat tensor over the bytes in ``data``, which nothing may write to."""
    with warnings.catch_warnings():  # torch warns where the bytes are read-only
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where torch itself would have put them. Matrix products round differently at odd addresses."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def to_dtype(border: Border, dtype: torch.dtype, device: torch.device) -> Border:
    """The border on ``device``, its floating point tensors in ``dtype``; what is so already is not copied."""
    moved = (
        tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in border.tensors
    )
    return Border(tuple(moved))


def by_slot(shape: BorderShape, border: Border) -> Mapping[Slot, torch.Tensor | None]:
    """The border's tensors by what they are; None for one that the model did without."""
    tensors = (None if _is_absent(tensor) else tensor for tensor in border.tensors)
    return dict(zip(shape.slots, tensors, strict=True))


def _is_absent(tensor: torch.Tensor) -> bool:
    return tensor.dtype == ABSENT.dtype and tensor.shape == ABSENT.shape
