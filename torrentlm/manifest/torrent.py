"""Hybrid v1+v2 torrents (BEP 3, BEP 52, BEP 47's pad files) whose info-hashes are a function of content and name alone.

The info dictionary is written explicitly, key by key: no dates, trackers, file modes, versions or comments. The reader
accepts only the structure that the writer would have written for the same files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torrentlm import bencode
from torrentlm.errors import ArtifactError

LEAF = 16 * 1024  # bytes per leaf of a BEP 52 hash tree
MAX_PIECE_LENGTH = 16 * 1024 * 1024
MAX_TORRENT = 32 * 1024 * 1024  # bytes of a .torrent that are worth reading
MAX_DEPTH = 8  # folders below a torrent's root
_USUAL_PIECES = 1024


def piece_length(size: int, smallest: int = LEAF) -> int:
    """The fixed rule: the smallest power of two, from ``smallest`` to 16 MiB, that makes at most 1024 pieces."""
    length = smallest
    while length < MAX_PIECE_LENGTH and length * _USUAL_PIECES < size:
        length *= 2
    return length


def safe_name(text: str) -> str:
    """A name that is one harmless path component on every system: ASCII letters, digits and ``._-``, at most 100."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100].strip(".-")
    return name or "model"


@dataclass(frozen=True, slots=True)
class FileHashes:
    """What a torrent says about one file's content.

    ``pieces``: 20-byte SHA-1 digests, the last one over what is left (or padded with zeros to a whole piece).
    ``root``: BEP 52 pieces root. ``layer``: the pieces' 32-byte hashes, empty if the file is no longer than one piece.
    """

    size: int
    pieces: bytes
    root: bytes
    layer: bytes


class Hasher:
    """Both hash trees of one file in one pass: feed bytes in any chunks, then ``finish``.

    ``update`` feeds both. ``update_v1`` and ``update_v2`` feed one each and share nothing, so that two threads can work
    at once; hashlib leaves the interpreter to others meanwhile.
    """

    def __init__(self, piece_length: int) -> None:
        self._piece_length = piece_length
        self._v1_size = 0
        self._v1_piece = hashlib.sha1(usedforsecurity=False)
        self._v1_pieces: list[bytes] = []
        self._v2_size = 0
        self._leaf = hashlib.sha256()
        self._leaves: list[bytes] = []

    def update(self, data: bytes | memoryview) -> None:
        self.update_v1(data)
        self.update_v2(data)

    def update_v1(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            chunk = view[: self._piece_length - self._v1_size % self._piece_length]
            self._v1_piece.update(chunk)
            self._v1_size += len(chunk)
            view = view[len(chunk) :]
            if self._v1_size % self._piece_length == 0:
                self._end_piece()

    def update_v2(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            chunk = view[: LEAF - self._v2_size % LEAF]
            self._leaf.update(chunk)
            self._v2_size += len(chunk)
            view = view[len(chunk) :]
            if self._v2_size % LEAF == 0:
                self._end_leaf()

    def finish(self, *, padded: bool = False) -> FileHashes:
        """The hashes; ``padded`` when a pad file fills the last v1 piece with zeros."""
        if self._v2_size % LEAF:
            self._end_leaf()
        if left := -self._v1_size % self._piece_length:
            if padded:
                self._v1_piece.update(bytes(left))
            self._end_piece()
        root, layer = _tree(self._leaves, self._piece_length)
        return FileHashes(self._v2_size, b"".join(self._v1_pieces), root, layer)

    def _end_leaf(self) -> None:
        self._leaves.append(self._leaf.digest())
        self._leaf = hashlib.sha256()

    def _end_piece(self) -> None:
        self._v1_pieces.append(self._v1_piece.digest())
        self._v1_piece = hashlib.sha1(usedforsecurity=False)


def _tree(leaves: Sequence[bytes], piece_length: int) -> tuple[bytes, bytes]:
    """Pieces root and piece layer over a file's leaf hashes (BEP 52)."""
    per_piece = piece_length // LEAF
    if len(leaves) <= per_piece:
        return _root(leaves, _height(len(leaves)), bytes(32)), b""
    height = _height(per_piece)
    pieces = [_root(leaves[at : at + per_piece], height, bytes(32)) for at in range(0, len(leaves), per_piece)]
    return _layer_root(pieces, piece_length), b"".join(pieces)


def _layer_root(pieces: Sequence[bytes], piece_length: int) -> bytes:
    padding = _root([], _height(piece_length // LEAF), bytes(32))
    return _root(pieces, _height(len(pieces)), padding)


def _root(nodes: Sequence[bytes], height: int, padding: bytes) -> bytes:
    """Root of a binary tree of ``height`` over ``nodes``; ``padding`` stands for every missing one."""
    for _ in range(height):
        padded = [*nodes, padding] if len(nodes) % 2 else nodes
        nodes = [hashlib.sha256(padded[i] + padded[i + 1]).digest() for i in range(0, len(padded), 2)]
        padding = hashlib.sha256(padding + padding).digest()
    return nodes[0] if nodes else padding


def _height(nodes: int) -> int:
    return (nodes - 1).bit_length() if nodes > 1 else 0


@dataclass(frozen=True, slots=True)
class TorrentFile:
    """One file of a torrent: path components below the root (for a single-file torrent just the name), bytes, root."""

    path: tuple[str, ...]
    size: int
    root: bytes


@dataclass(frozen=True)
class Torrent:
    """A hybrid torrent. ``info`` is the bencoded info dictionary; ``layers`` maps pieces roots to piece layers."""

    info: bytes
    layers: Mapping[bytes, bytes]
    name: str
    piece_length: int
    files: tuple[TorrentFile, ...]

    @cached_property
    def v1(self) -> bytes:
        """BEP 3 info-hash, 20 bytes."""
        return hashlib.sha1(self.info, usedforsecurity=False).digest()

    @cached_property
    def v2(self) -> bytes:
        """BEP 52 info-hash, 32 bytes; its first 20 stand in handshakes and in the DHT."""
        return hashlib.sha256(self.info).digest()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """The .torrent file."""
        layers = bencode.encode(dict(self.layers))
        return b"d4:info" + self.info + b"12:piece layers" + layers + b"e"

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "torrent") -> Torrent:
        """Read a .torrent that this module could have written; raise ArtifactError for anything else.

        Piece layers may be missing, as they are after a magnet's metadata exchange; those that are there are verified.
        Keys beside the info dictionary and the layers are ignored.
        """
        try:
            return _parse(data)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{what} is not a torrent that torrentlm publishes ({error})") from error


def pieces_root(path: Path) -> bytes:
    """BEP 52 pieces root of the file at ``path``; it does not depend on the piece length. Raises OSError."""
    hasher = Hasher(MAX_PIECE_LENGTH)
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update_v2(buffer[:count])
    return hasher.finish().root


def single_file(name: str, hashes: FileHashes, piece_length: int) -> Torrent:
    """The torrent of one file called ``name``."""
    return _build(name, [((name,), hashes)], piece_length)


def multi_file(name: str, files: Mapping[str, bytes]) -> Torrent:
    """The torrent of a folder ``name``: file contents by ``/``-separated path. All are small enough to be in memory.

    Raises ValueError for an empty file or a path that is not plainly below the folder.
    """
    length = piece_length(sum(len(content) for content in files.values()))
    paths = sorted((tuple(path.split("/")) for path in files), key=_path_order)
    hashed = []
    for path in paths:
        hasher = Hasher(length)
        hasher.update(files["/".join(path)])
        hashed.append((path, hasher.finish(padded=path != paths[-1])))
    return _build(name, hashed, length)


def _path_order(path: tuple[str, ...]) -> tuple[bytes, ...]:
    """v1 lists files in the order in which the v2 file tree, a bencoded dictionary, has them."""
    return tuple(part.encode() for part in path)


def _build(name: str, files: Sequence[tuple[tuple[str, ...], FileHashes]], length: int) -> Torrent:
    listed = tuple(TorrentFile(path, hashes.size, hashes.root) for path, hashes in files)
    _check_names(name, listed)
    if any(file.size == 0 for file in listed):
        raise ValueError("a torrent's file is empty")
    info = _info(name, listed, length, b"".join(hashes.pieces for _, hashes in files))
    layers = {hashes.root: hashes.layer for _, hashes in files if hashes.layer}
    return Torrent(info, layers, name, length, listed)


def _info(name: str, files: Sequence[TorrentFile], length: int, pieces: bytes) -> bytes:
    tree: dict[str, bencode.Encodable] = {}
    for file in files:
        folder = tree
        for part in file.path[:-1]:
            folder = folder.setdefault(part, {})  # type: ignore[assignment]
        folder[file.path[-1]] = {"": {"length": file.size, "pieces root": file.root}}
    info: dict[str, bencode.Encodable] = {
        "file tree": tree,
        "meta version": 2,
        "name": name,
        "piece length": length,
        "pieces": pieces,
    }
    if _is_single(name, files):
        info["length"] = files[0].size
    else:
        info["files"] = list(_v1_files(files, length))
    return bencode.encode(info)


def _is_single(name: str, files: Sequence[TorrentFile]) -> bool:
    return len(files) == 1 and files[0].path == (name,)


def _v1_files(files: Sequence[TorrentFile], length: int) -> Iterable[dict[str, bencode.Encodable]]:
    """The v1 list: a pad file after every file but the last, so that each begins a piece as it does in v2 (BEP 47)."""
    for file in files:
        yield {"length": file.size, "path": file.path}
        if (padding := -file.size % length) and file is not files[-1]:
            yield {"attr": "p", "length": padding, "path": (".pad", str(padding))}


def _check_names(name: str, files: Sequence[TorrentFile]) -> None:
    paths = {file.path for file in files}
    if not files or len(paths) != len(files):
        raise ValueError("its files have no distinct paths")
    for path in paths:
        if not 1 <= len(path) <= MAX_DEPTH or any(path[:depth] in paths for depth in range(1, len(path))):
            raise ValueError("its folders are nested too deeply, or one is a file too")
    for part in {name, *(part for path in paths for part in path)}:
        if part in ("", ".", "..", ".pad") or len(part.encode()) > 255 or re.search(r"[/\\:\x00-\x1f\x7f]", part):
            raise ValueError(f"{part!r} is not a safe file name")


def _parse(data: bytes) -> Torrent:
    metainfo = bencode.decode(data, max_size=MAX_TORRENT)
    if not isinstance(metainfo, dict) or not isinstance(info := metainfo[b"info"], dict):
        raise TypeError("it has no info dictionary")
    name, length, pieces, tree = (info[key] for key in (b"name", b"piece length", b"pieces", b"file tree"))
    if not isinstance(name, bytes) or not isinstance(pieces, bytes) or not isinstance(length, int):
        raise TypeError("its info dictionary has values of the wrong type")
    if not LEAF <= length <= MAX_PIECE_LENGTH or length & (length - 1):
        raise ValueError(f"its piece length is {length}")
    files = tuple(_walk(tree, ()))
    root_name = name.decode()
    _check_names(root_name, files)
    if len(pieces) != 20 * sum(-(-file.size // length) for file in files):
        raise ValueError("its v1 pieces do not cover its files")
    encoded = bencode.encode(info)
    if _info(root_name, files, length, pieces) != encoded:
        raise ValueError("its info dictionary is not the canonical one")
    layers = _check_layers(metainfo.get(b"piece layers", {}), files, length)
    return Torrent(encoded, layers, root_name, length, files)


def _walk(tree: object, path: tuple[str, ...]) -> Iterable[TorrentFile]:
    if not isinstance(tree, dict) or len(path) > MAX_DEPTH:
        raise TypeError("its file tree is malformed")
    for key, entry in tree.items():
        if key:
            yield from _walk(entry, (*path, key.decode()))
            continue
        if not isinstance(entry, dict) or len(tree) != 1:
            raise TypeError("its file tree is malformed")
        size, root = entry[b"length"], entry[b"pieces root"]
        if not isinstance(size, int) or size < 1 or not isinstance(root, bytes) or len(root) != 32:
            raise ValueError("its file tree has a size or hash that cannot be")
        yield TorrentFile(path, size, root)


def _check_layers(layers: object, files: Iterable[TorrentFile], length: int) -> dict[bytes, bytes]:
    if not isinstance(layers, dict):
        raise TypeError("its piece layers are malformed")
    sizes = {file.root: file.size for file in files if file.size > length}
    for root, layer in layers.items():
        if root not in sizes or not isinstance(layer, bytes) or len(layer) != 32 * -(-sizes[root] // length):
            raise ValueError("its piece layers do not belong to its files")
        if _layer_root([layer[at : at + 32] for at in range(0, len(layer), 32)], length) != root:
            raise ValueError("its piece layers do not hash to the pieces root")
    return layers
