"""The manifest: which blocks a model has, which files a block needs, what they hold, and which torrents they are.

Blocks and files are numbered; a file may serve several blocks (tied embeddings) and exists once. Tensor names in files
are relative (no layer number, no model prefix), so that equal layers of different models are equal files; each block
says how they map to the checkpoint's names. Files that differ in their values alone share one numbered layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import msgpack

from torrentlm.errors import ArtifactError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import DTYPE_BYTES, MAX_DIMENSIONS, Layout, TensorSpec
from torrentlm.records import Span

VERSION = 2
FILE_NAME = "manifest.msgpack"
MAX_BYTES = 4 * 1024 * 1024
MAX_BLOCKS = 16_384
MAX_FILES = 65_536
MAX_TENSORS = 262_144  # of all layouts, and of all blocks, where a tensor counts for every block that has it
MAX_TEXT = 512  # characters of any name
FLOORS = ("F32", "BF16", "F16", "INT8", "INT4")
Kind: TypeAlias = Literal["stem", "layers", "head"]
Task: TypeAlias = Literal["causal-lm", "encoder", "seq2seq"]
Rewind: TypeAlias = Literal["trim", "snapshot", "replay"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One canonical safetensors file. ``name`` is its pieces root in hexadecimal + ``.safetensors``, ``size`` in bytes.

    ``v1`` (20 bytes) and ``v2`` (32 bytes) are the info-hashes of its torrent; ``layout`` is the number of its layout.
    """

    name: str
    size: int
    v1: bytes
    v2: bytes
    layout: int


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A file as one block uses it. ``names`` are pairs of prefixes: (in the file, in the checkpoint)."""

    file: int
    names: tuple[tuple[str, str], ...]

    def full_name(self, name: str) -> str:
        """The checkpoint's name of the file's tensor ``name``: the longest prefix that fits decides.

        Raises ArtifactError when none fits.
        """
        return next(self.full_names((name,)))

    def full_names(self, names: Iterable[str]) -> Iterator[str]:
        """Like ``full_name``, for one after the other."""
        in_checkpoint = dict(reversed(self.names))  # of equal prefixes the first counts
        lengths = sorted({len(prefix) for prefix in in_checkpoint}, reverse=True)
        for name in names:
            length = next((length for length in lengths if name[:length] in in_checkpoint), None)
            if length is None:
                raise ArtifactError(
                    f"the manifest does not say what tensor {name!r} is; the model must be published again"
                )
            yield in_checkpoint[name[:length]] + name[length:]


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block. ``layers`` are the layer calls of a block of kind ``layers``, None for the stem and the head.

    ``rewind`` is how the block's state goes back to an earlier token: it can be cut anywhere ("trim"), it can go back
    over the latest steps ("snapshot"), or it has none and runs the whole text in every step ("replay").
    """

    kind: Kind
    layers: Span | None
    files: tuple[BlockFile, ...]
    rewind: Rewind = "trim"


@dataclass(frozen=True, slots=True)
class Side:
    """One run of blocks from a stem to a head: the whole model, or its encoder, or its decoder.

    ``layer_stack`` is the path of the list of layers in the module tree (several lists are joined by "+"), ``layers``
    the number of layer calls, ``chunks`` whether a prompt may come in parts, ``encoder`` whether the model is called
    once for each text.
    """

    layer_stack: str
    layers: int
    chunks: bool = True
    encoder: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model torrent's ``manifest.msgpack`` says. Blocks run in order: the stem, the layers, the head.

    ``architecture`` is transformers' class name, ``dtype`` the weights' (safetensors' name). ``layouts`` are those of
    the files, each once. ``floor`` is the lowest precision that holders may use, None for any.
    """

    name: str
    architecture: str
    dtype: str
    sides: tuple[Side, ...]
    blocks: tuple[BlockEntry, ...]
    files: tuple[FileEntry, ...]
    layouts: tuple[Layout, ...]
    floor: str | None = None

    @property
    def task(self) -> Task:
        """What the model is for."""
        if len(self.sides) > 1:
            return "seq2seq"
        return "encoder" if self.sides[0].encoder else "causal-lm"

    @property
    def layers(self) -> int:
        """Layer calls of all sides."""
        return sum(side.layers for side in self.sides)

    def side_blocks(self, side: int) -> Span:
        """The blocks of one side."""
        stems = [block for block, entry in enumerate(self.blocks) if entry.kind == "stem"]
        return Span(stems[side], [*stems[1:], len(self.blocks)][side] - 1)

    def side_of(self, block: int) -> int:
        """The side that a block belongs to."""
        return sum(entry.kind == "stem" for entry in self.blocks[: block + 1]) - 1

    @property
    def size(self) -> int:
        """Bytes of all files, each counted once."""
        return sum(file.size for file in self.files)

    def block_files(self, block: int) -> tuple[FileEntry, ...]:
        return self.span_files(block, block)

    def span_files(self, first: int, last: int) -> tuple[FileEntry, ...]:
        """The distinct files that blocks ``first`` to ``last`` (inclusive) need, in block order."""
        indices = dict.fromkeys(used.file for block in self.blocks[first : last + 1] for used in block.files)
        return tuple(self.files[index] for index in indices)

    def block_tensors(self, block: int) -> tuple[TensorSpec, ...]:
        """The block's tensors under the checkpoint's names, file by file."""
        return tuple(tensor for used in self.blocks[block].files for tensor in self.tensors_of(used))

    def tensors_of(self, used: BlockFile) -> Iterator[TensorSpec]:
        """A file's tensors under the names that the checkpoint has for them in one block."""
        specs = self.layouts[self.files[used.file].layout].specs
        for spec, name in zip(specs, used.full_names(spec.name for spec in specs), strict=True):
            yield replace(spec, name=name)

    def block_label(self, block: int) -> str:
        """For people: ``block 0 (stem)``, ``block 7 (layers 12-13)``."""
        entry = self.blocks[block]
        if entry.layers is None:
            return f"block {block} ({entry.kind})"
        return f"block {block} ({'layers' if len(entry.layers) > 1 else 'layer'} {entry.layers})"

    def to_bytes(self) -> bytes:
        """Deterministic msgpack: maps sorted by key, no alternatives."""
        blocks = [
            {
                "files": [{"file": used.file, "names": [list(pair) for pair in used.names]} for used in block.files],
                "kind": block.kind,
                "layers": None if block.layers is None else [block.layers.first, block.layers.last],
                "rewind": block.rewind,
            }
            for block in self.blocks
        ]
        content = {
            "architecture": self.architecture,
            "blocks": blocks,
            "dtype": self.dtype,
            "files": pack_files(self.files),
            "layouts": pack_layouts(self.layouts),
            "name": self.name,
            "sides": [
                {"chunks": side.chunks, "encoder": side.encoder, "layer_stack": side.layer_stack, "layers": side.layers}
                for side in self.sides
            ],
            "version": VERSION,
        }
        if self.floor is not None:  # left out where there is none, so that such a model has one magnet
            content = dict(sorted({**content, "floor": self.floor}.items()))
        return bytes(msgpack.packb(content))

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read and check a manifest; raise ArtifactError unless every part of it makes sense together."""
        try:
            manifest = _read(data)
            _check(manifest)
            _check_encoding(manifest, data)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ArtifactError(
                f"the model's manifest is not usable ({error}); is this magnet a torrentlm model?"
            ) from error
        return manifest


def pack_files(files: Iterable[FileEntry]) -> list[dict[str, object]]:
    """Files as ``read_file`` takes them."""
    return [
        {"layout": file.layout, "name": file.name, "size": file.size, "v1": file.v1, "v2": file.v2} for file in files
    ]


def pack_layouts(layouts: Iterable[Layout]) -> list[list[list[object]]]:
    """Layouts as ``read_layouts`` takes them."""
    return [[[spec.name, spec.dtype, list(spec.shape)] for spec in layout.specs] for layout in layouts]


def _read(data: bytes) -> Manifest:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    content = msgpack.unpackb(data, max_str_len=4 * MAX_TEXT, max_bin_len=32, max_array_len=MAX_TENSORS, max_map_len=16)
    if isinstance(content, dict) and content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r:.20}, this torrentlm reads version {VERSION}")
    has_floor = isinstance(content, dict) and "floor" in content
    fields = Fields(content, f"architecture blocks dtype files {'floor ' * has_floor}layouts name sides version")
    return Manifest(
        name=fields.text("name"),
        architecture=fields.text("architecture"),
        dtype=fields.text("dtype"),
        sides=tuple(_read_side(item) for item in fields.items("sides", 2)),
        blocks=tuple(_read_block(item) for item in fields.items("blocks", MAX_BLOCKS)),
        files=tuple(read_file(item) for item in fields.items("files", MAX_FILES)),
        layouts=tuple(read_layouts(fields.items("layouts", MAX_FILES))),
        floor=fields.text("floor") if has_floor else None,
    )


def _read_side(item: object) -> Side:
    fields = Fields(item, "chunks encoder layer_stack layers")
    return Side(fields.text("layer_stack"), fields.number("layers"), fields.flag("chunks"), fields.flag("encoder"))


def _read_block(item: object) -> BlockEntry:
    fields = Fields(item, "files kind layers rewind")
    kind, layers, rewind = fields.text("kind"), fields.value("layers"), fields.text("rewind")
    if kind not in get_args(Kind):
        raise ValueError(f"there is no kind of block {kind!r}")
    if rewind not in get_args(Rewind):
        raise ValueError(f"there is no way to rewind called {rewind!r}")
    files = []
    for entry in fields.items("files", MAX_FILES):
        used = Fields(entry, "file names")
        names = [exactly(pair, str, str) for pair in used.items("names", MAX_FILES)]
        if any(len(prefix) > MAX_TEXT for pair in names for prefix in pair):
            raise ValueError("a prefix of tensors' names is too long")
        files.append(BlockFile(used.number("file"), tuple((first, second) for first, second in names)))
    span = None if layers is None else Span(*exactly(layers, int, int))
    return BlockEntry(cast(Kind, kind), span, tuple(files), cast(Rewind, rewind))


def read_file(item: object) -> FileEntry:
    fields = Fields(item, "layout name size v1 v2")
    return FileEntry(
        fields.text("name"),
        fields.number("size"),
        fields.digest("v1", 20),
        fields.digest("v2", 32),
        fields.number("layout"),
    )


def read_layouts(items: list[Any]) -> Iterator[Layout]:
    if not all(isinstance(item, list) for item in items):
        raise TypeError("a layout is not a list of tensors")
    if sum(map(len, items)) > MAX_TENSORS:
        raise ValueError("its layouts have too many tensors")
    for item in items:
        specs = tuple(map(_read_tensor, item))
        layout = canonical.layout(specs)
        if layout.specs != specs:
            raise ValueError("a layout's tensors are not in the canonical order")
        yield layout


def _read_tensor(item: object) -> TensorSpec:
    name, dtype, shape = exactly(item, str, str, list)
    if not 1 <= len(name) <= MAX_TEXT:
        raise ValueError("a tensor's name is empty or too long")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r:.80} has the unknown dtype {dtype!r:.20}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r:.80} has {len(shape)} dimensions")
    if not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in shape):
        raise ValueError(f"the shape of tensor {name!r:.80} is out of range")
    return TensorSpec(name, dtype, tuple(shape))


def _check(manifest: Manifest) -> None:
    """What must hold between the parts: ValueError with the first that does not."""
    if manifest.dtype not in DTYPE_BYTES:
        raise ValueError(f"its dtype is {manifest.dtype!r}")
    if manifest.floor is not None and manifest.floor not in FLOORS:
        raise ValueError(f"its floor is {manifest.floor!r:.20}")
    for side in manifest.sides:
        if not all(part.isidentifier() or part.isdigit() for part in re.split(r"[.+]", side.layer_stack)):
            raise ValueError("its layer stack is not a path in a module tree")
    check_file_names(manifest.files)
    kinds = "".join(block.kind[0] for block in manifest.blocks)
    if [side.encoder for side in manifest.sides] not in ([False], [True], [True, False]):
        raise ValueError("its sides are not one, or an encoder and a decoder")
    if not re.fullmatch(f"(sl+h){{{len(manifest.sides)}}}", kinds):
        raise ValueError("its blocks are not a stem, layers and a head for each side")
    for number, side in enumerate(manifest.sides):
        blocks = manifest.side_blocks(number)
        if _layers_covered(manifest.blocks[blocks.first : blocks.last + 1]) != side.layers:
            raise ValueError("its blocks do not cover every layer")
    used = [used.file for block in manifest.blocks for used in block.files]
    if set(used) != set(range(len(manifest.files))):
        raise ValueError("its blocks and its list of files disagree")
    check_layouts(manifest.files, manifest.layouts)
    _check_names(manifest)


def _check_encoding(manifest: Manifest, data: bytes) -> None:
    """A model has one encoding: no keys in another order, no numbers in longer forms."""
    if manifest.to_bytes() != data:
        raise ValueError("it is not written in the one canonical way")


def check_file_names(files: Sequence[FileEntry]) -> None:
    """Each file is there once, and its name is one of a content, which no path can be made of."""
    if not all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", file.name) for file in files):
        raise ValueError("a file is not named by its content's hash")
    if len({file.name for file in files}) != len(files):
        raise ValueError("a file is listed twice")


def check_layouts(files: Sequence[FileEntry], layouts: Sequence[Layout]) -> None:
    """Each layout is there once, in the order in which the files first use them, and makes files of the right size."""
    sizes = [layout.size for layout in layouts]
    due = 0
    for file in files:
        if file.layout >= len(sizes):
            raise ValueError(f"a file has layout {file.layout}, and there are {len(sizes)}")
        if file.layout > due:
            raise ValueError("its layouts are not in the order of their first use")
        if file.size != sizes[file.layout]:
            raise ValueError(f"a file has {file.size} bytes where its layout makes {sizes[file.layout]}")
        due = max(due, file.layout + 1)
    if due < len(sizes):
        raise ValueError(f"no file has layout {due}")
    if len({layout.header for layout in layouts}) != len(sizes):
        raise ValueError("a layout is listed twice")


def _check_names(manifest: Manifest) -> None:
    """Every tensor of every block has one name of its own in the checkpoint, and there are not too many to list."""
    total = 0
    for number, block in enumerate(manifest.blocks):
        total += sum(len(manifest.layouts[manifest.files[used.file].layout].tensors) for used in block.files)
        if total > MAX_TENSORS:
            raise ValueError("its blocks have too many tensors")
        names = [spec.name for spec in manifest.block_tensors(number)]
        if len(set(names)) != len(names):
            raise ValueError(f"{manifest.block_label(number)} has two tensors of one name")


def _layers_covered(blocks: Sequence[BlockEntry]) -> int:
    """How many layers the blocks hold, each once and in order."""
    due = 0
    for block in blocks:
        if (block.layers is None) == (block.kind == "layers"):
            raise ValueError(f"a block of kind {block.kind} has the wrong layers")
        if block.layers is not None:
            if block.layers.first != due:
                raise ValueError(f"layer {due} is missing or out of order")
            due = block.layers.last + 1
    return due


class Fields:
    """Typed access to one decoded map that must have exactly the given keys."""

    def __init__(self, item: object, keys: str) -> None:
        if not isinstance(item, Mapping) or set(item) != set(keys.split()):
            raise ValueError(f"a map does not have the keys {keys}")
        self._item = item

    def value(self, key: str) -> Any:
        return self._item[key]

    def _typed(self, key: str, kind: type[_T]) -> _T:
        value = self._item[key]
        if type(value) is not kind:
            raise TypeError(f"{key} is not of type {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        value = self._typed(key, str)
        if not 1 <= len(value) <= MAX_TEXT:
            raise ValueError(f"{key} is empty or too long")
        return value

    def number(self, key: str) -> int:
        value = self._typed(key, int)
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{key} is out of range")
        return value

    def flag(self, key: str) -> bool:
        return self._typed(key, bool)

    def digest(self, key: str, size: int) -> bytes:
        value = self._typed(key, bytes)
        if len(value) != size:
            raise ValueError(f"{key} is not {size} bytes")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        value = self._typed(key, list)
        if len(value) > most:
            raise ValueError(f"{key} has too many entries")
        return value


def exactly(value: object, *kinds: type) -> list[Any]:
    if not isinstance(value, list) or [type(item) for item in value] != list(kinds):
        raise TypeError("an entry of a list is malformed")
    return value
