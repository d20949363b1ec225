"""Where the tensors of a GGUF file lie: its directory, read with bounded reads and checked against the file's size.

::

    "GGUF" <u32 version> <u64 tensors> <u64 settings>
    settings times: <string key> <u32 type> <value>
    tensors times:  <string name> <u32 dimensions> <u64 size>... <u32 tensor type> <u64 offset>
    padding to the alignment, then the tensors' bytes, which offsets count from

A string is <u64 length> <bytes>, an array <u32 type> <u64 length> <values>; all is little-endian. The gguf package
has a reader, too, which makes objects of every token of the vocabulary: seconds and 130 MB that we need not spend.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from torrentlm.errors import ArtifactError
from torrentlm.publish.source import unreadable

MAX_DIMENSIONS = 8
MAX_TENSORS = 1 << 20
MAX_STRING = 1 << 16  # bytes of a name, a key or a setting that is kept
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in the file. ``shape`` in elements, row-major; ``start`` in bytes from the beginning."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(math.prod(self.shape) // block * block_bytes)


def read_directory(path: Path) -> tuple[str, list[Stored]]:
    """The architecture that the file names, and its tensors. Raises ArtifactError if it is damaged or cut short."""
    try:
        with path.open("rb") as file:
            return _read(_Reader(file))
    except (ValueError, struct.error) as error:
        raise ArtifactError(f"{path} is not a usable GGUF file ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _read(reader: _Reader) -> tuple[str, list[Stored]]:
    if reader.bytes(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := reader.number("<I")) not in (2, 3):
        raise ValueError(f"it is of version {version}, or big-endian")
    tensors, settings = reader.number("<Q"), reader.number("<Q")
    if tensors > MAX_TENSORS:
        raise ValueError(f"it claims to have {tensors} tensors")
    architecture, alignment = "", GGUF_DEFAULT_ALIGNMENT
    for _ in range(settings):
        key, kind = reader.text(), reader.number("<I")
        if key == "general.architecture" and kind == _STRING:
            architecture = reader.text()
        elif key == "general.alignment" and kind == _UINT32:
            alignment = reader.number("<I")
        else:
            reader.skip(kind)
    entries = [reader.tensor() for _ in range(tensors)]
    if not architecture or alignment < 1:
        raise ValueError("it does not name its architecture")
    begin = -(-reader.at // alignment) * alignment
    stored = [Stored(name, kind, shape, begin + offset) for name, kind, shape, offset in entries]
    if len({tensor.name for tensor in stored}) != len(stored):
        raise ValueError("it has two tensors of one name")
    if any(tensor.start + tensor.nbytes > reader.size for tensor in stored):
        raise ValueError("it ends before its tensors do")
    return architecture, stored


class _Reader:
    """Takes values off a file, never more bytes than it has. Raises ValueError where it ends too early."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > self.size:
            raise ValueError("it is cut short")
        return self._file.read(count)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.bytes(struct.calcsize(form)))[0])

    def text(self) -> str:
        length = self.number("<Q")
        if length > MAX_STRING:
            raise ValueError(f"a name has {length} bytes")
        return self.bytes(length).decode()

    def skip(self, kind: int) -> None:
        """Pass over a value of type ``kind``. Arrays do not nest in practice, nor here."""
        count = 1
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            for _ in range(count):
                self._leap(self.number("<Q"))
        elif kind in _VALUE_BYTES:
            self._leap(count * _VALUE_BYTES[kind])
        else:
            raise ValueError(f"it has a setting of type {kind}")

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        """Name, type, shape (row-major) and offset of one tensor."""
        name, dimensions = self.text(), self.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(self.number("<I"))
        if shape and shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"the rows of tensor {name} are no whole blocks of {kind.name}")
        return name, kind, shape, self.number("<Q")

    def _leap(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise ValueError("it is cut short")
        self._file.seek(self.at)
