"""An adapter: low-rank changes to linear layers of one base model, one small block file per block that they touch.

For a linear layer with the weight W the adapter has A, [rank, in], and B, [out, rank], and the layer gives
``W x + scaling · B (A x)``. Files, layouts and names are those of models (manifest.py): relative to the layer, so that
the same changes are the same file, whatever adapter and publisher they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgpack

from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import FLOATING, Layout, TensorSpec
from torrentlm.manifest.manifest import (
    MAX_BLOCKS,
    MAX_BYTES,
    MAX_FILES,
    MAX_TENSORS,
    MAX_TEXT,
    BlockFile,
    Fields,
    FileEntry,
    check_file_names,
    check_layouts,
    exactly,
    pack_files,
    pack_layouts,
    read_file,
    read_layouts,
)
from torrentlm.records import AdapterId, Span

VERSION = 1
FILE_NAME = "adapter.msgpack"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What the names of A and B end with, after the name of the linear layer."""


@dataclass(frozen=True, slots=True)
class AdapterBlock:
    """What an adapter has for block ``block`` of its base: a file, and a scaling for each linear layer in it.

    The scalings stand in the order of the layers' names in the file.
    """

    block: int
    used: BlockFile
    scalings: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """What an adapter torrent's ``adapter.msgpack`` says. ``base`` are the info-hashes of the base's model torrent."""

    name: str
    base: AdapterId
    blocks: tuple[AdapterBlock, ...]
    files: tuple[FileEntry, ...]
    layouts: tuple[Layout, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, each counted once."""
        return sum(file.size for file in self.files)

    @property
    def touched(self) -> frozenset[int]:
        """The blocks of the base that this adapter changes."""
        return frozenset(entry.block for entry in self.blocks)

    def within(self, span: Span) -> tuple[AdapterBlock, ...]:
        """What it has for the blocks of ``span``, in their order."""
        return tuple(entry for entry in self.blocks if entry.block in span)

    def span_files(self, span: Span) -> tuple[FileEntry, ...]:
        """The distinct files that ``span`` needs."""
        return tuple(self.files[index] for index in dict.fromkeys(entry.used.file for entry in self.within(span)))

    def scalings(self, entry: AdapterBlock) -> dict[str, float]:
        """The scaling of each linear layer of a block, by the layer's name in the model."""
        modules = _modules(self.layouts[self.files[entry.used.file].layout].specs)
        return dict(zip(entry.used.full_names(modules), entry.scalings, strict=True))

    def to_bytes(self) -> bytes:
        """Deterministic msgpack, as the model's manifest."""
        blocks = [
            {
                "block": entry.block,
                "file": entry.used.file,
                "names": [list(pair) for pair in entry.used.names],
                "scalings": list(entry.scalings),
            }
            for entry in self.blocks
        ]
        content = {
            "base": {"v1": self.base.v1, "v2": self.base.v2},
            "blocks": blocks,
            "files": pack_files(self.files),
            "layouts": pack_layouts(self.layouts),
            "name": self.name,
            "version": VERSION,
        }
        return bytes(msgpack.packb(content))

    @classmethod
    def from_bytes(cls, data: bytes) -> AdapterManifest:
        """Read and check it; raise ArtifactError unless every part of it makes sense together."""
        try:
            manifest = _read(data)
            _check(manifest)
            if manifest.to_bytes() != data:
                raise ValueError("it is not written in the one canonical way")  # noqa: TRY301
        except (ValueError, TypeError, KeyError, ArtifactError, msgpack.UnpackException) as error:
            raise ArtifactError(
                f"the adapter's manifest is not usable ({error}); is this magnet a torrentlm adapter?"
            ) from error
        return manifest


def _read(data: bytes) -> AdapterManifest:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    content = msgpack.unpackb(data, max_str_len=4 * MAX_TEXT, max_bin_len=32, max_array_len=MAX_TENSORS, max_map_len=16)
    if isinstance(content, dict) and content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r:.20}, this torrentlm reads version {VERSION}")
    fields = Fields(content, "base blocks files layouts name version")
    base = Fields(fields.value("base"), "v1 v2")
    return AdapterManifest(
        name=fields.text("name"),
        base=AdapterId(base.digest("v1", 20), base.digest("v2", 32)),
        blocks=tuple(_read_block(item) for item in fields.items("blocks", MAX_BLOCKS)),
        files=tuple(read_file(item) for item in fields.items("files", MAX_FILES)),
        layouts=tuple(read_layouts(fields.items("layouts", MAX_FILES))),
    )


def _read_block(item: object) -> AdapterBlock:
    fields = Fields(item, "block file names scalings")
    names = [exactly(pair, str, str) for pair in fields.items("names", MAX_FILES)]
    if any(len(prefix) > MAX_TEXT for pair in names for prefix in pair):
        raise ValueError("a prefix of tensors' names is too long")
    scalings = fields.items("scalings", MAX_TENSORS)
    if not all(type(scaling) is float and math.isfinite(scaling) for scaling in scalings):
        raise ValueError("a scaling is no number")
    used = BlockFile(fields.number("file"), tuple((first, second) for first, second in names))
    return AdapterBlock(fields.number("block"), used, tuple(scalings))


def _check(manifest: AdapterManifest) -> None:
    """What must hold between the parts: ValueError with the first that does not."""
    check_file_names(manifest.files)
    check_layouts(manifest.files, manifest.layouts)
    numbers = [entry.block for entry in manifest.blocks]
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] >= MAX_BLOCKS:
        raise ValueError("its blocks are out of order")
    if {entry.used.file for entry in manifest.blocks} != set(range(len(manifest.files))):
        raise ValueError("its blocks and its list of files disagree")
    for layout in manifest.layouts:
        check_pairs(layout.specs)
    seen: set[str] = set()
    for entry in manifest.blocks:
        names = manifest.scalings(entry)
        if seen & names.keys() or len(names) != len(entry.scalings):
            raise ValueError("a linear layer is changed twice")
        seen |= names.keys()


def check_pairs(specs: Sequence[TensorSpec]) -> None:
    """Each linear layer has an A, [rank, in], and a B, [out, rank], and there is nothing else; ValueError if not."""
    by_name = {spec.name: spec for spec in specs}
    for module in _modules(specs):
        down, up = (by_name.get(module + end) for end in (DOWN, UP))
        if down is None or up is None:
            raise ValueError(f"{module} lacks {DOWN if down is None else UP}")
        if down.dtype not in FLOATING or up.dtype not in FLOATING:
            raise ValueError(f"{module} has changes of another kind than numbers with a point")
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or down.shape[0] < 1:
            raise ValueError(f"A and B of {module} have the shapes {list(down.shape)} and {list(up.shape)}")


def _modules(specs: Sequence[TensorSpec]) -> list[str]:
    """The linear layers that a file's tensors are for, by their names in the file, sorted."""
    return sorted(set(_module_names(specs)))


def _module_names(specs: Sequence[TensorSpec]) -> Iterator[str]:
    for spec in specs:
        end = next((end for end in (DOWN, UP) if spec.name.endswith(end)), None)
        if end is None:
            raise ValueError(f"tensor {spec.name!r:.80} is neither an A nor a B")
        yield spec.name.removesuffix(end)
