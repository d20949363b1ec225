"""What an earlier run has published: recognised by the recipe and the source's stamps, and then checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import FILE_NAME, Manifest
from torrentlm.manifest.sidecar import Sidecar
from torrentlm.manifest.torrent import Torrent, multi_file, pieces_root
from torrentlm.publish.source import Location, locate, unreadable
from torrentlm.swarm.files import storage_errors
from torrentlm.swarm.store import Store

FORMAT = 5
"""Raised whenever the same source would be published as other bytes: records of earlier versions are then ignored."""


@dataclass(frozen=True, slots=True)
class Published:
    """A model in the store: its torrent ``model`` with the files in ``folder``, and the torrents of ``manifest.files``.

    ``left_out`` names the checkpoint's tensors that no block reads; empty when an earlier run published the model.
    ``sidecar`` says how its split was proven; None where that is not known any more.
    """

    manifest: Manifest
    model: Torrent
    torrents: tuple[Torrent, ...]
    folder: Path
    left_out: tuple[str, ...] = ()
    sidecar: Sidecar | None = None

    @property
    def magnet(self) -> Magnet:
        return Magnet(self.model.v1, self.model.v2, self.model.name)


Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all (1 until that is known), and what is being done.

What it raises ends the publishing, cleanly.
"""


def recognise(recipe: Recipe, store: Store) -> Published | None:
    """What an earlier run published from this recipe, if all of it is still there and unchanged, its proof included.

    Raises ConfigError (no such source), ArtifactError.
    """
    known = recall(look_up(recipe, store.data)[1], store)
    return known if known is not None and known.sidecar is not None else None


def look_up(recipe: Recipe, data: Path) -> tuple[Location, Path]:
    """Where the source lies, and the record of what it was published as. Raises ConfigError, ArtifactError."""
    location = locate(recipe)
    try:
        return location, record_of(recipe, location, data)
    except OSError as error:
        raise unreadable(location.path, error) from error


def record_of(recipe: Recipe, location: Location, data: Path) -> Path:
    """The file that says what this recipe was published as, as long as its source does not change. Raises OSError."""
    kept = replace(recipe, allow_nan=False, tokenizer=True, consume=False)  # they change no byte
    key = json.dumps([FORMAT, asdict(kept), location.path, location.stamps()], default=str, sort_keys=True)
    return data / "published" / hashlib.sha256(key.encode()).hexdigest()


def remember(record: Path, v2: bytes) -> None:
    """Write that the record's source is published as the model torrent ``v2``, whole or not at all. Raises OSError."""
    record.parent.mkdir(exist_ok=True)
    temporary = record.with_suffix(".new")
    temporary.write_text(v2.hex())
    temporary.replace(record)


def magnet_of(recipe: Recipe, data: Path) -> Magnet | None:
    """The magnet of what a node with this data folder published from ``recipe``; None if it did not.

    Only reads, so that it works beside the node that has the folder. Raises ConfigError (no such source)
    and ArtifactError.
    """
    _, record = look_up(recipe, data)
    try:
        v2 = record.read_text()
        encoded = (data / "torrents" / f"{v2}.torrent").read_bytes()
    except OSError:
        return None
    torrent = Torrent.from_bytes(encoded)
    return Magnet(torrent.v1, torrent.v2, torrent.name)


def stored_manifest(magnet: Magnet, data: Path) -> Manifest | None:
    """The manifest of a model whose model torrent this data folder has; None where it does not, or not intact.

    Only reads, as ``magnet_of`` does.
    """
    if magnet.v2 is None:
        return None
    try:
        torrent = Torrent.from_bytes((data / "torrents" / f"{magnet.v2.hex()}.torrent").read_bytes())
        path = data / "models" / magnet.v2.hex() / torrent.name / FILE_NAME
        roots = {file.path: file.root for file in torrent.files}
        if torrent.v2 != magnet.v2 or pieces_root(path) != roots.get((FILE_NAME,)):
            return None
        return Manifest.from_bytes(path.read_bytes())
    except (OSError, ArtifactError):
        return None


def copy_model(magnet: Magnet, data: Path, store: Store) -> None:
    """Give ``store`` the model torrent, its content and its sidecars, if the data folder ``data`` has them intact.

    They are small: a client of this machine need not wait for a peer to send them. Raises StorageError.
    """
    if magnet.v2 is None or store.load_torrent(magnet.v2) is not None or stored_manifest(magnet, data) is None:
        return
    name, folder = magnet.v2.hex(), store.model_folder(magnet.v2)
    with storage_errors(folder):
        torrent = (data / "torrents" / f"{name}.torrent").read_bytes()
        shutil.copytree(data / "models" / name, folder, dirs_exist_ok=True)
        for heard in (False, True):
            sidecar = data / "sidecars" / f"{name}{'.heard' if heard else ''}"
            if sidecar.is_file():
                store.save_sidecar(magnet.v2, sidecar.read_bytes(), heard=heard)
    store.save_torrent(magnet.v2, torrent)


def stored_models(store: Store) -> Iterator[tuple[Manifest, Path]]:
    """Every model whose model torrent is in the store, intact, with the folder of its content. Blocks on the disk."""
    for path in sorted(store.torrents.glob("*.torrent")):
        if (found := _stored(path, store)) is not None:
            yield found


def published_files(store: Store) -> frozenset[str]:
    """The names of the block files of all models that were published here, which may be nowhere else."""
    names: set[str] = set()
    for record in (store.data / "published").glob("*"):
        with contextlib.suppress(OSError, ValueError):
            v2 = bytes.fromhex(record.read_text())
            found = _stored(store.torrents / f"{v2.hex()}.torrent", store)
            names |= set() if found is None else {file.name for file in found[0].files}
    return frozenset(names)


def _stored(torrent: Path, store: Store) -> tuple[Manifest, Path] | None:
    try:
        v2 = bytes.fromhex(torrent.stem)
        manifest = stored_manifest(Magnet(None, v2), store.data)
        name = Torrent.from_bytes(torrent.read_bytes()).name
    except (OSError, ValueError, ArtifactError):
        return None
    return None if manifest is None else (manifest, store.model_folder(v2) / name)


def recall(record: Path, store: Store) -> Published | None:
    """What the record names, if all of it is still in the store and unchanged; None otherwise."""
    try:
        v2 = bytes.fromhex(record.read_text())
    except (OSError, ValueError):
        return None
    return load(v2, store)


def load(v2: bytes, store: Store) -> Published | None:
    """The published model with this v2 info-hash, if all of it is in the store and unchanged; None otherwise."""
    try:
        encoded = store.load_torrent(v2)
        if encoded is None:
            return None
        model = Torrent.from_bytes(encoded)
        folder = store.model_folder(v2) / model.name
        payload = {"/".join(file.path): folder.joinpath(*file.path).read_bytes() for file in model.files}
        if model.v2 != v2 or multi_file(model.name, payload) != model:
            return None
        manifest = Manifest.from_bytes(payload[FILE_NAME])
        torrents = tuple(Torrent.from_bytes(payload[f"blocks/{file.name}.torrent"]) for file in manifest.files)
    except (OSError, ValueError, KeyError, ArtifactError):
        return None
    if not all(store.holds(file.name) for file in manifest.files):
        return None
    return Published(manifest, model, torrents, folder, sidecar=own_sidecar(v2, store))


def own_sidecar(v2: bytes, store: Store) -> Sidecar | None:
    """The sidecar that this node made for the model; None if there is none that can be used. Raises StorageError."""
    data = store.load_sidecar(v2)
    try:
        return None if data is None else Sidecar.from_bytes(data, v2)
    except ArtifactError:
        return None
