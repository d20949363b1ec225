"""The manifest: which blocks a model has, which files a block needs, and which torrents those files are.

Blocks and files are numbered; a file may serve several blocks (tied embeddings) and exists once. Tensor names in files
are relative (no layer number, no model prefix), so that equal layers of different models are equal files; each block
says how they map to the checkpoint's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import msgpack

from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import DTYPE_BYTES
from torrentlm.records import Span

VERSION = 1
FILE_NAME = "manifest.msgpack"
MAX_BYTES = 16 * 1024 * 1024
MAX_BLOCKS = 16_384
MAX_FILES = 65_536
MAX_TEXT = 512  # characters of any name
TASK = "causal-lm"

Kind: TypeAlias = Literal["stem", "layers", "head"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One canonical safetensors file. ``name`` is its pieces root in hexadecimal + ``.safetensors``, ``size`` in bytes.

    ``v1`` (20 bytes) and ``v2`` (32 bytes) are the info-hashes of its torrent.
    """

    name: str
    size: int
    v1: bytes
    v2: bytes


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A file as one block uses it. ``names`` are pairs of prefixes: (in the file, in the checkpoint)."""

    file: int
    names: tuple[tuple[str, str], ...]

    def full_name(self, name: str) -> str:
        """The checkpoint's name of the file's tensor ``name``: the longest prefix that fits decides.

        Raises ArtifactError when none fits.
        """
        fitting = [pair for pair in self.names if name.startswith(pair[0])]
        if not fitting:
            raise ArtifactError(f"the manifest does not say what tensor {name!r} is; the model must be published again")
        in_file, in_checkpoint = max(fitting, key=lambda pair: len(pair[0]))
        return in_checkpoint + name[len(in_file) :]


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block. ``layers`` are the layer numbers of a block of kind ``layers``, None for the stem and the head."""

    kind: Kind
    layers: Span | None
    files: tuple[BlockFile, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model torrent's ``manifest.msgpack`` says. Blocks run in order: the stem, the layers, the head.

    ``architecture`` is transformers' class name, ``dtype`` the weights' (safetensors' name), ``layer_stack`` the path
    of the list of layers in the module tree, ``layers`` its length.
    """

    name: str
    architecture: str
    dtype: str
    layer_stack: str
    layers: int
    blocks: tuple[BlockEntry, ...]
    files: tuple[FileEntry, ...]
    task: str = TASK

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
            }
            for block in self.blocks
        ]
        files = [{"name": file.name, "size": file.size, "v1": file.v1, "v2": file.v2} for file in self.files]
        content = {
            "architecture": self.architecture,
            "blocks": blocks,
            "dtype": self.dtype,
            "files": files,
            "layer_stack": self.layer_stack,
            "layers": self.layers,
            "name": self.name,
            "task": self.task,
            "version": VERSION,
        }
        return bytes(msgpack.packb(content))

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read and check a manifest; raise ArtifactError unless every part of it makes sense together."""
        try:
            manifest = _read(data)
            _check(manifest)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ArtifactError(
                f"the model's manifest is not usable ({error}); is this magnet a torrentlm model?"
            ) from error
        return manifest


def _read(data: bytes) -> Manifest:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    content = msgpack.unpackb(data, max_str_len=4 * MAX_TEXT, max_bin_len=32, max_array_len=MAX_FILES, max_map_len=16)
    if isinstance(content, dict) and content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r:.20}, this torrentlm reads version {VERSION}")
    fields = _Fields(content, "architecture blocks dtype files layer_stack layers name task version")
    return Manifest(
        name=fields.text("name"),
        architecture=fields.text("architecture"),
        dtype=fields.text("dtype"),
        layer_stack=fields.text("layer_stack"),
        layers=fields.number("layers"),
        blocks=tuple(_read_block(item) for item in fields.items("blocks", MAX_BLOCKS)),
        files=tuple(_read_file(item) for item in fields.items("files", MAX_FILES)),
        task=fields.text("task"),
    )


def _read_block(item: object) -> BlockEntry:
    fields = _Fields(item, "files kind layers")
    kind, layers = fields.text("kind"), fields.value("layers")
    if kind not in get_args(Kind):
        raise ValueError(f"there is no kind of block {kind!r}")
    files = []
    for entry in fields.items("files", MAX_FILES):
        used = _Fields(entry, "file names")
        names = [_exactly(pair, str, str) for pair in used.items("names", MAX_FILES)]
        files.append(BlockFile(used.number("file"), tuple((first, second) for first, second in names)))
    return BlockEntry(cast(Kind, kind), None if layers is None else Span(*_exactly(layers, int, int)), tuple(files))


def _read_file(item: object) -> FileEntry:
    fields = _Fields(item, "name size v1 v2")
    return FileEntry(fields.text("name"), fields.number("size"), fields.digest("v1", 20), fields.digest("v2", 32))


def _check(manifest: Manifest) -> None:
    """What must hold between the parts: ValueError with the first that does not."""
    if manifest.task != TASK:
        raise ValueError(f"its task is {manifest.task!r}")
    if manifest.dtype not in DTYPE_BYTES:
        raise ValueError(f"its dtype is {manifest.dtype!r}")
    if not all(part.isidentifier() or part.isdigit() for part in manifest.layer_stack.split(".")):
        raise ValueError("its layer stack is not a path in a module tree")
    if not all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", file.name) for file in manifest.files):
        raise ValueError("a file is not named by its content's hash")
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise ValueError("a file is listed twice")
    kinds = [block.kind for block in manifest.blocks]
    if len(kinds) < 3 or kinds != ["stem", *["layers"] * (len(kinds) - 2), "head"]:
        raise ValueError("its blocks are not a stem, layers and a head")
    if _layers_covered(manifest.blocks) != manifest.layers:
        raise ValueError("its blocks do not cover every layer")
    used = [used.file for block in manifest.blocks for used in block.files]
    if set(used) != set(range(len(manifest.files))):
        raise ValueError("its blocks and its list of files disagree")


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


class _Fields:
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


def _exactly(value: object, *kinds: type) -> list[Any]:
    if not isinstance(value, list) or [type(item) for item in value] != list(kinds):
        raise TypeError("a pair is malformed")
    return value
