"""A node's data folder: block files, model torrents, identity, last session's peers. One node, one folder.

    <data>/format            the layout's version; another version is refused
    <data>/lock              held while a node uses the folder
    <data>/identity.key      the node's Ed25519 seed, hexadecimal, mode 0600
    <data>/verified.json     size and modification time of every block file that matched its hash
    <data>/used.json         when each was last used (space.py)
    <data>/peers.json        endpoints that answered last time
    <data>/endpoint          where the node that has or last had the folder listens
    <data>/blocks/           <pieces root>.safetensors, one per file, shared by all models
    <data>/models/<v2 hex>/  the content of a model's torrent, or of a published adapter's
    <data>/torrents/         <v2 hex>.torrent of these
    <data>/adapters/         adapters that sessions brought along, while the node runs (node/adapters.py)
    <data>/sidecars/         <v2 hex> of models proven here, <v2 hex>.heard of others

A block file counts as here only while its verified record matches what is on disk: fetched in part, cut short or
touched since, it is checked again before it is served or loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from torrentlm.errors import ArtifactError, FolderInUseError, StorageError
from torrentlm.manifest.torrent import pieces_root
from torrentlm.records import Endpoint
from torrentlm.swarm.files import MAX_JSON, read_json, storage_errors, write_atomically
from torrentlm.swarm.identity import SEED_BYTES, Identity

FORMAT = "torrentlm store 1"
MAX_PEERS = 200
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class Store:
    """The data folder ``data``, locked for this process until ``close``. Its methods block on the disk only."""

    def __init__(self, data: Path) -> None:
        """Open or create the folder; StorageError if it cannot be used (in use, another version, not writable)."""
        self.data = data
        self.blocks = data / "blocks"
        self.models = data / "models"
        self.torrents = data / "torrents"
        with storage_errors(data):
            for folder in (data, self.blocks, self.models, self.torrents):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(data)
        try:
            with storage_errors(data):
                self._check_format()
                self._verified = _read_verified(data)
        except StorageError:
            self.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- identity and peers

    def identity(self) -> Identity:
        """This folder's node identity, made on first use."""
        path = self.data / "identity.key"
        with storage_errors(path):
            if not path.exists():
                identity = Identity.generate()
                write_atomically(path, identity.seed.hex() + "\n", mode=0o600)
                return identity
            path.chmod(0o600)
            text = path.read_text(encoding="ascii", errors="replace").strip()
        try:
            seed = bytes.fromhex(text)
        except ValueError:
            seed = b""
        if len(seed) != SEED_BYTES:
            raise StorageError(f"{path} is not an identity key; move it away to get a new identity")
        return Identity(seed)

    def load_peers(self) -> tuple[Endpoint, ...]:
        """Endpoints of the last session, best first; none if there are none or the file is damaged."""
        entries = read_json(self.data / "peers.json")
        if not isinstance(entries, list):
            return ()
        peers = []
        for entry in entries[:MAX_PEERS]:
            with contextlib.suppress(ValueError, AttributeError):
                peers.append(Endpoint.parse(entry))
        return tuple(dict.fromkeys(peers))

    def save_peers(self, peers: Iterable[Endpoint]) -> None:
        """Remember the first ``MAX_PEERS`` of ``peers`` for the next start."""
        path = self.data / "peers.json"
        with storage_errors(path):
            write_atomically(path, json.dumps([str(peer) for peer in list(peers)[:MAX_PEERS]], indent=0), durable=False)

    def save_endpoint(self, endpoint: Endpoint) -> None:
        """Say where this node listens, for clients of the same machine."""
        path = self.data / "endpoint"
        with storage_errors(path):
            write_atomically(path, f"{endpoint}\n", durable=False)

    # -- block files

    def path(self, name: str) -> Path:
        """Where the block file ``name`` lies or would lie; ArtifactError unless the name is a content address."""
        if not self.is_name(name):
            raise ArtifactError(f"{name!r} is not the name of a block file; the manifest is damaged")
        return self.blocks / name

    @staticmethod
    def is_name(name: str) -> bool:
        """Whether a block file may be called so: by a content address."""
        return _FILE_NAME.fullmatch(name) is not None

    def holds(self, name: str) -> bool:
        """Whether the file is complete: it matched its hash and was not touched since (size, modification time)."""
        record = self._verified.get(name)
        return record is not None and record == _stamp(self.path(name))

    def held(self) -> frozenset[str]:
        """The names of all complete block files."""
        return frozenset(name for name in self._verified if self.holds(name))

    def mark_verified(self, name: str) -> None:
        """Record that the file, as it lies there now, matches its hash."""
        path = self.path(name)
        stamp = _stamp(path)
        if stamp is None:
            raise StorageError(f"{path} is missing although it was just complete; did something else remove it?")
        self._verified[name] = stamp
        try:
            self._save_verified()
        except StorageError:
            del self._verified[name]  # a record that no later start sees is none
            raise

    def mark_unverified(self, name: str) -> None:
        """Forget the record: the file is checked before it is used again."""
        if self._verified.pop(name, None) is not None:
            self._save_verified()

    def verify(self, name: str) -> bool:
        """Hash the file now and record the outcome. Streams it (about 1 GB/s): call it in a worker thread."""
        good = self.matches(name)
        if good:
            self.mark_verified(name)
        else:
            self.mark_unverified(name)
        return good

    def matches(self, name: str) -> bool:
        """Whether the file's content is what its name says. As slow as ``verify``, but changes nothing: any thread."""
        path = self.path(name)
        with storage_errors(path):
            return path.is_file() and pieces_root(path).hex() == root_of(name)

    def cut(self, name: str, size: int) -> None:
        """Cut off what lies behind the end of a file that shall have ``size`` bytes: no piece covers that."""
        path = self.path(name)
        with storage_errors(path):
            if path.is_file() and path.stat().st_size > size:
                os.truncate(path, size)

    # -- models

    def model_folder(self, v2: bytes) -> Path:
        """Where the content of the model torrent with this v2 info-hash lies."""
        return self.models / v2.hex()

    def save_torrent(self, v2: bytes, torrent: bytes) -> None:
        path = self.torrents / f"{v2.hex()}.torrent"
        with storage_errors(path):
            write_atomically(path, torrent)

    def load_torrent(self, v2: bytes) -> bytes | None:
        """The model's .torrent file if an earlier session kept it."""
        path = self.torrents / f"{v2.hex()}.torrent"
        with storage_errors(path):
            return path.read_bytes() if path.is_file() else None

    def save_sidecar(self, v2: bytes, sidecar: bytes, *, heard: bool = False) -> None:
        """Keep the sidecar of the model with this v2 info-hash: made here, or ``heard`` of a peer."""
        path = self._sidecar(v2, heard)
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, sidecar, durable=False)

    def load_sidecar(self, v2: bytes, *, heard: bool = False) -> bytes | None:
        """What ``save_sidecar`` kept; None if there is none, or if something else lies there."""
        path = self._sidecar(v2, heard)
        with storage_errors(path):
            return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_JSON else None

    def _sidecar(self, v2: bytes, heard: bool) -> Path:
        return self.data / "sidecars" / f"{v2.hex()}{'.heard' if heard else ''}"

    # -- inner workings

    def _check_format(self) -> None:
        path = self.data / "format"
        if not path.exists():
            write_atomically(path, FORMAT + "\n")
        elif (found := path.read_text(encoding="utf-8", errors="replace").strip()[:80]) != FORMAT:
            raise StorageError(
                f"{self.data} was written by another version ({found!r}, not {FORMAT!r}); choose another folder"
            )

    def _save_verified(self) -> None:
        path = self.data / "verified.json"
        with storage_errors(path):
            write_atomically(path, json.dumps(self._verified, indent=0, sort_keys=True), durable=False)


def root_of(name: str) -> str:
    """The pieces root, in hexadecimal, that a block file's name says."""
    return name.partition(".")[0]


def read_endpoint(data: Path) -> Endpoint | None:
    """Where the node that has, or last had, this data folder listens. Only reads: works beside that node."""
    try:
        return Endpoint.parse((data / "endpoint").read_text(encoding="ascii")[:300])
    except (OSError, ValueError):
        return None


def _read_verified(data: Path) -> dict[str, tuple[int, int]]:
    entries = read_json(data / "verified.json")
    if not isinstance(entries, dict):
        return {}
    return {
        name: (stamp[0], stamp[1])
        for name, stamp in entries.items()
        if _FILE_NAME.fullmatch(name) and isinstance(stamp, list) and len(stamp) == 2
    }


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _lock(data: Path) -> IO[bytes]:
    handle = (data / "lock").open("ab")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise FolderInUseError(
            f"{data} is in use by another node; stop it or choose another folder with --data"
        ) from None
    return handle
