"""Tensors inside a message: named by an entry in its header, their bytes behind it.

An entry is ``[dtype, dimension, ...]``, or ``[dtype + 16, stored bytes, dimension, ...]`` if the bytes are one zstd
frame. Only integers and masks are ever compressed: floats do not shrink, and ids do to a third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zstandard

from torrentlm.errors import RemoteProtocolError

MAX_EXPANDED = 256 << 10
"""Most bytes that the compressed tensors of one message may expand to, all together."""
COMPRESS_FROM = 512
MAX_RANK = 8
MAX_DIMENSION = 2**31 - 1
CHECKSUM_SIZE = 8

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes per element of every dtype, by its name in safetensors. A dtype's number on the wire is its place in this
table."""

_DTYPES = tuple(ITEM_SIZES)
_DTYPE_NUMBERS = {name: number for number, name in enumerate(_DTYPES)}
_ZSTD = 16
"""Added to the dtype's number when a tensor's bytes are one zstd frame."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's values in C order, little-endian. Decoded ones are writable views of the message, aligned to 8
    bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [B, n, …] behind one another along n. RemoteProtocolError if a peer made them too different for that."""
    if len(parts) == 1:
        return parts[0]
    dtype, (batch, _, *rest) = parts[0].dtype, parts[0].shape
    if any((part.dtype, part.shape[0], part.shape[2:]) != (dtype, batch, tuple(rest)) for part in parts):
        raise RemoteProtocolError("a peer sent tensors of different shapes in answer to equal steps")
    sizes = [part.nbytes // batch for part in parts]
    rows = (part.data[row * n : (row + 1) * n] for row in range(batch) for part, n in zip(parts, sizes, strict=True))
    return Tensor(dtype, (batch, sum(part.shape[1] for part in parts), *rest), b"".join(rows))


class PayloadWriter:
    """Collects tensor data behind a header whose length is not known yet."""

    __slots__ = ("blobs", "expansion")

    def __init__(self) -> None:
        self.blobs: list[memoryview] = []
        self.expansion = 0

    def add(self, tensor: Tensor) -> list[int]:
        """Take a tensor's data, compressed where that pays; return its entry in the header."""
        number, shape = _DTYPE_NUMBERS.get(tensor.dtype, -1), tensor.shape
        size = _tensor_size(number, shape)
        view = memoryview(tensor.data)
        if view.nbytes != size:
            raise ValueError(f"holds {view.nbytes} bytes for {tensor.dtype} {shape}, which takes {size}")
        if size == 0:
            view = memoryview(b"")
        elif view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        if size >= COMPRESS_FROM and "F" not in tensor.dtype and self.expansion + size <= MAX_EXPANDED:
            packed = zstandard.ZstdCompressor(level=1).compress(view)
            if len(packed) <= size - size // 8:
                self.expansion += size
                self.blobs.append(memoryview(packed))
                return [number + _ZSTD, len(packed), *shape]
        self.blobs.append(view)
        return [number, *shape]


class PayloadReader:
    """Hands out the tensors of a message in order. Every size is checked against what is really there."""

    __slots__ = ("_end", "_position", "_view", "expansion")

    def __init__(self, view: memoryview, position: int) -> None:
        self._view = view
        self._position = position
        self._end = len(view) - CHECKSUM_SIZE
        self.expansion = 0

    def take(self, entry: Any) -> Tensor:
        """The tensor that a header entry describes."""
        if type(entry) is not tuple or not entry or type(entry[0]) is not int:
            raise ValueError("is no tensor entry")
        number, shape = entry[0], entry[1:]
        if number < _ZSTD:
            size = _tensor_size(number, shape)
            return Tensor(_DTYPES[number], shape, self._slice(size))
        if not shape or type(shape[0]) is not int:
            raise ValueError("is a compressed tensor without a length")
        number, stored, shape = number - _ZSTD, shape[0], shape[1:]
        size = _tensor_size(number, shape)
        self.expansion += size
        if self.expansion > MAX_EXPANDED:
            raise ValueError(f"expands to more than {MAX_EXPANDED} bytes")
        return Tensor(_DTYPES[number], shape, memoryview(_decompress(self._slice(stored), size)))

    def finish(self) -> None:
        """The payload must end where its last tensor ends."""
        if self._position != self._end:
            raise ValueError(f"{self._end - self._position} bytes do not belong to any tensor")

    def _slice(self, size: int) -> memoryview:
        start = aligned(self._position)
        if not 0 <= size <= self._end - start:
            raise ValueError(f"wants {size} bytes of a payload that has {max(0, self._end - start)} left")
        self._position = start + size
        return self._view[start : start + size]


def aligned(position: int) -> int:
    """Tensor data begins at multiples of 8 bytes from the message's start."""
    return (position + 7) & -8


def _tensor_size(number: int, shape: Sequence[int]) -> int:
    if not 0 <= number < len(_DTYPES):
        raise ValueError("has an unknown dtype")
    if len(shape) > MAX_RANK or not all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in shape):
        raise ValueError("has a shape out of bounds")
    return math.prod(shape) * ITEM_SIZES[_DTYPES[number]]


def _decompress(data: memoryview, size: int) -> bytearray:
    """One zstd frame that says itself that it holds exactly ``size`` bytes; nothing larger is ever allocated."""
    try:
        if zstandard.frame_content_size(data) != size:
            raise ValueError("is compressed and does not say its true size")
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    if len(plain) != size:
        raise ValueError("is compressed and has another size than it says")
    return bytearray(plain)
