"""Remove a published checkpoint's weight files, so that the block files are the only copy of the weights on the disk.

Block files cannot share their bytes with the shards that they are made from: a torrent's file is a whole file, a link
is to a whole file too, and the tensors lie in other places, so that not even a copy-on-write clone of ranges fits. What
is left is to keep one of the two. The shards are removed only when every tensor in them is in the store bit for bit,
under its name and in its precision, and when the block files were read back and hashed: all of them or none.

What will be removed is written down before the first file goes, so that a run that is killed is finished by the next
one, and the model is known by what is left of its folder afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torrentlm.config import Recipe
from torrentlm.publish.checkpoint import INDEX, SINGLE, Checkpoint
from torrentlm.publish.published import Published, load, record_of, remember
from torrentlm.publish.source import Location, locate
from torrentlm.swarm.files import storage_error
from torrentlm.swarm.store import Store

log = logging.getLogger(__name__)

Listed = list[tuple[str, int, int]]
"""Name, size and modification time (ns) of files in the checkpoint's folder."""


def consume(recipe: Recipe, store: Store, published: Published) -> None:
    """Remove the weight files of ``recipe``'s folder, of which ``published`` was made; warn if they must stay.

    Raises StorageError (a file cannot be removed), ArtifactError (the folder is damaged).
    """
    location = locate(recipe)
    stamps = {name: (name, size, modified) for name, size, modified in location.stamps()}
    if not stamps.keys() & {SINGLE, INDEX}:
        return  # gone already
    try:
        why = _obstacle(recipe, location, store, published)
    except OSError as error:
        raise storage_error(error, store.data) from error
    if why is not None:
        log.warning("the weights in %s are kept: %s", location.path, why)
        return
    removed = [path.name for path in Checkpoint(location.path).weight_files]
    listed = [stamps[name] for name in (*removed, INDEX) if name in stamps]
    _write_journal(_journal(recipe, store), published, listed)
    finish_consuming(recipe, store)


def _obstacle(recipe: Recipe, location: Location, store: Store, published: Published) -> str | None:
    """Why the checkpoint is not, or not only, a second copy of what is in the store; None if it is."""
    record = record_of(recipe, location, store.data)
    if not record.is_file() or record.read_text() != published.model.v2.hex():
        return "they have changed since they were published"
    source = Checkpoint(location.path)
    manifest = published.manifest
    stored = {spec for block in manifest.blocks for used in block.files for spec in manifest.tensors_of(used)}
    for path, names in source.weight_files.items():
        for name in sorted(names):
            if source.tensors.get(name) not in stored:
                return f"no block has tensor {name} of {path.name} as it is there"
    for file in manifest.files:
        if not store.verify(file.name):
            return f"{store.path(file.name)} is not what was written; check the disk"
    for folder in (store.blocks, store.models, published.folder, store.torrents, record.parent):
        _sync(folder)
    return None


def finish_consuming(recipe: Recipe, store: Store) -> None:
    """Remove what an earlier call of ``consume`` was about to, as far as it is unchanged. Raises StorageError."""
    journal = _journal(recipe, store)
    found = _read_journal(journal)
    if found is None:
        return
    v2, listed = found
    location = locate(recipe)
    try:
        if load(v2, store) is not None:
            for name, *_ in sorted(set(listed) & set(location.stamps())):
                (location.path / name).unlink()
            remember(record_of(recipe, location, store.data), v2)
        journal.unlink()
    except OSError as error:
        raise storage_error(error, location.path) from error


def _sync(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _journal(recipe: Recipe, store: Store) -> Path:
    """Named by the recipe alone: the source's stamps change while files go."""
    kept = replace(recipe, allow_nan=False, tokenizer=True, consume=False)
    key = hashlib.sha256(json.dumps(asdict(kept), default=str, sort_keys=True).encode()).hexdigest()
    return store.data / "published" / f"{key}.consuming"


def _write_journal(path: Path, published: Published, listed: Listed) -> None:
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"v2": published.model.v2.hex(), "files": listed}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(error, path) from error


def _read_journal(path: Path) -> tuple[bytes, Listed] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        listed = [(str(name), int(size), int(modified)) for name, size, modified in found["files"]]
        return bytes.fromhex(found["v2"]), listed
    except (OSError, ValueError, KeyError, TypeError):
        return None
