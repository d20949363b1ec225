"""Canonical safetensors: one set of named tensors has exactly one file, byte for byte, whoever writes it.

The header is compact JSON without free-form metadata, padded with spaces so that the tensor bytes begin at a multiple
of ``ALIGNMENT``. Tensors whose size is such a multiple, too, come first, so that these (all the large ones, in
practice) can be computed with where they lie when the file is mapped; the others stand in order of element size
(largest first), so that each is aligned to its element. Among equals the name decides::

    <u64 little-endian header length> <header> <tensor bytes, little-endian, C order> ...

The layout follows from names, dtypes and shapes alone, so a file is written in one pass, tensor by tensor. The reader
takes any well-formed safetensors file and believes nothing in it before checking it against the file's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from torrentlm.errors import ArtifactError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes per element, by safetensors' names. Types that pack several elements into a byte are left out."""
FLOATING = frozenset(("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0"))
"""Those that become the dtype that is computed in; the others stay as they are."""

ALIGNMENT = 64
"""Bytes: a cache line, and what torch gives its own tensors on a processor."""
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_DIMENSIONS = 16
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values. ``dtype`` is a key of ``DTYPE_BYTES``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def described(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor's bytes lie: ``start`` and ``end`` count from the beginning of the file."""

    tensor: TensorSpec
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What comes before the tensor bytes (``header``, with its length field) and where they lie, in file order."""

    header: bytes
    tensors: tuple[Placed, ...]

    @property
    def size(self) -> int:
        """The whole file's, in bytes."""
        return self.tensors[-1].end if self.tensors else len(self.header)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(placed.tensor for placed in self.tensors)


def layout(tensors: Iterable[TensorSpec]) -> Layout:
    """The one canonical layout for these tensors.

    Raises ValueError for an unknown dtype, or a name that comes twice or is reserved.
    """
    specs = list(tensors)
    if unknown := {spec.dtype for spec in specs} - DTYPE_BYTES.keys():
        raise ValueError(f"no canonical form for dtype {min(unknown)}")
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("tensor names are not unique")
    if any(spec.name == _METADATA for spec in specs):
        raise ValueError(f"a tensor cannot be named {_METADATA}")
    specs.sort(key=lambda spec: (spec.nbytes % ALIGNMENT != 0, -DTYPE_BYTES[spec.dtype], spec.name))
    header: dict[str, object] = {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return Layout(len(text).to_bytes(8, "little") + text, _place(specs, 8 + len(text)))


def _place(specs: list[TensorSpec], at: int) -> tuple[Placed, ...]:
    placed = []
    for spec in specs:
        placed.append(Placed(spec, at, at + spec.nbytes))
        at += spec.nbytes
    return tuple(placed)


def write(
    target: Layout, read: Callable[[str], Iterable[bytes | memoryview]], sink: Callable[[bytes | memoryview], object]
) -> None:
    """Send the file to ``sink`` piece by piece; ``read(name)`` yields one tensor's bytes and is called in file order.

    Raises ValueError when a tensor turns out to have another size than its shape says.
    """
    sink(target.header)
    for placed in target.tensors:
        left = placed.tensor.nbytes
        for chunk in read(placed.tensor.name):
            sink(chunk)
            left -= memoryview(chunk).nbytes
        if left:
            raise ValueError(f"tensor {placed.tensor.name} has {-left:+d} bytes compared with its shape")


def read_layout(file: BinaryIO, size: int, what: str, *, max_header: int = MAX_HEADER) -> Layout:
    """Read and check the header of any safetensors file of ``size`` bytes; ``what`` names it in errors.

    Raises ArtifactError unless the tensors fill the file exactly, without gaps or overlaps.
    """
    try:
        return _read_layout(file, size, max_header)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{what} is not a usable safetensors file ({error}); fetch or make it again") from error


def read_canonical(file: BinaryIO, size: int, what: str) -> Layout:
    """Like ``read_layout``, and the file must be laid out canonically."""
    found = read_layout(file, size, what)
    if layout(placed.tensor for placed in found.tensors).header != found.header:
        raise ArtifactError(f"{what} is a safetensors file, but not in canonical form; publish the model again")
    return found


def _read_layout(file: BinaryIO, size: int, max_header: int) -> Layout:
    prefix = file.read(8)
    if len(prefix) != 8:
        raise ValueError("it is shorter than its header")
    length = int.from_bytes(prefix, "little")
    if length > min(max_header, size - 8):
        raise ValueError(f"it is truncated or its header is too long: {length} bytes")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("it is shorter than its header")
    header = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise TypeError("its header is not an object")
    header.pop(_METADATA, None)
    found = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda item: item[1:])
    at = 0
    for spec, start, end in found:
        if start != at or end - start != spec.nbytes:
            raise ValueError(f"the offsets of tensor {spec.name!r} do not fit its shape and the file")
        at = end
    if 8 + length + at != size:
        raise ValueError(f"it has {size} bytes where its header describes {8 + length + at}")
    return Layout(prefix + text, _place([spec for spec, _, _ in found], 8 + length))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """One checked entry of a header: the tensor, and its start and end counted from the first tensor byte."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header describes tensor {name!r} in an unknown way")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has the unsupported dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no usable shape or offsets")
    return TensorSpec(name, dtype, tuple(shape)), offsets[0], offsets[1]


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
