"""Publish an adapter: its changes as a block file for each block of the base that they touch, and the adapter torrent.

    PEFT folder ──▶ blocks/<pieces root>.safetensors, one per touched block
       └──▶ adapter.msgpack + block torrents ──▶ models/<v2 hex>/<name>/, whose magnet is the adapter's

Adapters are small: a block's file is made in memory.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torrentlm.compute.threads import first_import
from torrentlm.config import AdapterRecipe
from torrentlm.errors import ArtifactError, StorageError, UnsupportedModelError
from torrentlm.manifest import canonical
from torrentlm.manifest.adapter import DOWN, FILE_NAME, UP, AdapterBlock, AdapterManifest
from torrentlm.manifest.canonical import Layout, Placed, TensorSpec
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import BlockEntry, BlockFile, FileEntry, Manifest
from torrentlm.manifest.torrent import Hasher, Torrent, multi_file, piece_length, safe_name, single_file
from torrentlm.publish.peft import Change, PeftFolder
from torrentlm.records import AdapterId
from torrentlm.swarm.files import storage_error
from torrentlm.swarm.store import Store

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """An adapter in the store: its torrent, with the files in ``folder``, and the torrents of ``manifest.files``."""

    manifest: AdapterManifest
    torrent: Torrent
    torrents: tuple[Torrent, ...]
    folder: Path

    @property
    def magnet(self) -> Magnet:
        return Magnet(self.torrent.v1, self.torrent.v2, self.torrent.name)


@dataclass(frozen=True, slots=True)
class _Block:
    """A block's file before it is written: tensors by their names in the file, and the prefixes behind these."""

    block: int
    names: Names
    changes: Mapping[str, Change]  # by the linear layer's name in the file


def adapter_event(published: PublishedAdapter) -> dict[str, Any]:
    """The ``adapter`` event of docs/cli.md."""
    manifest = published.manifest
    blocks = sorted(manifest.touched)
    magnet = str(published.magnet)
    return {"event": "adapter", "name": manifest.name, "magnet": magnet, "size": manifest.size, "blocks": blocks}


def publish_adapter(recipe: AdapterRecipe, magnet: Magnet, base: Manifest, store: Store) -> PublishedAdapter:
    """Publish the adapter that ``recipe`` names for the model of ``magnet`` into ``store``.

    Blocks: call it in a worker thread. The same adapter gives the same torrents, whatever folder and machine it comes
    from. Raises ConfigError (no such folder), ArtifactError (broken, or not made for this model), UnsupportedModelError
    (more than a LoRA of linear layers), StorageError; whatever it raises, nothing half-published is left.
    """
    if magnet.v1 is None or magnet.v2 is None:
        raise ArtifactError("the base model's magnet has only one of its two hashes: copy the whole link")
    source = PeftFolder(recipe.folder)
    blocks = _distribute(source.changes, base, recipe)
    with _staging(store) as staging:
        written = [_write(block, source, staging) for block in blocks]
        manifest = _manifest(recipe.name, AdapterId(magnet.v1, magnet.v2), blocks, written)
        distinct = tuple({torrent.name: torrent for torrent, _ in written}.values())
        return _move_in(manifest, distinct, store, staging)


def _distribute(changes: Mapping[str, Change], base: Manifest, recipe: AdapterRecipe) -> list[_Block]:
    """Which change goes into the file of which block, in the blocks' order."""
    weights: dict[str, list[tuple[int, TensorSpec]]] = {}
    for number in range(len(base.blocks)):
        for spec in base.block_tensors(number):
            weights.setdefault(spec.name, []).append((number, spec))
    found: dict[int, dict[str, Change]] = {}
    for module, change in changes.items():
        places = weights.get(f"{module}.weight", [])
        if len(places) != 1:
            why = "does not have" if not places else "shares between blocks"
            raise ArtifactError(
                f"the adapter {recipe.name} changes {module[:100]}, which the model {base.name} {why}; "
                "name the model that it was trained on"
            )
        number, weight = places[0]
        if len(weight.shape) != 2:
            raise UnsupportedModelError(f"the adapter {recipe.name} changes {module}, which is no linear layer")
        _check_shape(module, change, weight, base.name)
        found.setdefault(number, {})[module] = change
    return [_Block(number, *_relative(base.blocks[number], found[number])) for number in sorted(found)]


def _check_shape(module: str, change: Change, weight: TensorSpec, base: str) -> None:
    into, out = change.down.tensor.shape[1], change.up.tensor.shape[0]
    if weight.shape not in ((out, into), (into, out)):  # some linear layers keep their weight the other way around
        raise ArtifactError(
            f"the adapter's change of {module} is for a weight of [{out}, {into}], but the model {base} has "
            f"{list(weight.shape)} there; name the model that it was trained on"
        )


def _relative(entry: BlockEntry, changes: Mapping[str, Change]) -> tuple[Names, dict[str, Change]]:
    """The prefixes of a block's own names, and its changes by the names in the file that these make."""
    pairs = [pair for used in entry.files for pair in used.names] if entry.layers is not None else []
    pairs.sort(key=lambda pair: -len(pair[1]))  # the longest that fits: not a part of the model, but the layer
    used: dict[tuple[str, str], None] = {}
    relative: dict[str, Change] = {}
    for module, change in changes.items():
        pair = next((pair for pair in pairs if module.startswith(pair[1])), ("", ""))
        used[pair] = None
        relative[pair[0] + module.removeprefix(pair[1])] = change
    names = tuple(sorted(used))
    whole = BlockFile(0, names)
    if len(relative) != len(changes) or set(whole.full_names(relative)) != set(changes):
        return (("", ""),), dict(changes)
    return names, relative


def _write(block: _Block, source: PeftFolder, staging: Path) -> tuple[Torrent, Layout]:
    """A block's file, under the name that its content gives it."""
    placed = {name + DOWN: change.down for name, change in block.changes.items()}
    placed |= {name + UP: change.up for name, change in block.changes.items()}
    layout = canonical.layout(replace(at.tensor, name=name) for name, at in placed.items())
    content = bytearray()
    canonical.write(layout, lambda name: _finite(placed[name], source), content.extend)
    length = piece_length(len(content))
    hasher = Hasher(length)
    hasher.update(memoryview(content))
    hashes = hasher.finish()
    torrent = single_file(f"{hashes.root.hex()}.safetensors", hashes, length)
    (staging / torrent.name).write_bytes(content)
    return torrent, layout


def _finite(placed: Placed, source: PeftFolder) -> Iterator[memoryview]:
    """A tensor's bytes. Raises ArtifactError where they are no numbers."""
    with first_import():
        from torrentlm.publish.checks import all_finite

    for chunk in source.read(placed):
        if not all_finite(chunk, placed.tensor.dtype):
            raise ArtifactError(
                f"the adapter in {source.folder} has values that are NaN or infinite ({placed.tensor.name[:100]}); "
                "fetch it again, or train it anew"
            )
        yield chunk


def _manifest(
    name: str, base: AdapterId, blocks: list[_Block], written: list[tuple[Torrent, Layout]]
) -> AdapterManifest:
    files: dict[str, FileEntry] = {}
    numbers: dict[Layout, int] = {}
    entries = []
    for block, (torrent, layout) in zip(blocks, written, strict=True):
        number = numbers.setdefault(layout, len(numbers))
        files.setdefault(torrent.name, FileEntry(torrent.name, torrent.size, torrent.v1, torrent.v2, number))
        used = BlockFile(list(files).index(torrent.name), block.names)
        scalings = tuple(block.changes[module].scaling for module in sorted(block.changes))
        entries.append(AdapterBlock(block.block, used, scalings))
    return AdapterManifest(name, base, tuple(entries), tuple(files.values()), tuple(numbers))


def _move_in(manifest: AdapterManifest, torrents: tuple[Torrent, ...], store: Store, staging: Path) -> PublishedAdapter:
    content = manifest.to_bytes()
    AdapterManifest.from_bytes(content)  # what no reader would take is not published
    files = {FILE_NAME: content} | {f"blocks/{torrent.name}.torrent": torrent.to_bytes() for torrent in torrents}
    adapter = multi_file(safe_name(manifest.name), files)
    root = staging / "adapter" / adapter.name
    (root / "blocks").mkdir(parents=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    for torrent in torrents:
        if not store.holds(torrent.name):
            (staging / torrent.name).replace(store.path(torrent.name))
            store.mark_verified(torrent.name)
    folder = store.model_folder(adapter.v2)
    shutil.rmtree(folder, ignore_errors=True)
    root.parent.replace(folder)
    store.save_torrent(adapter.v2, adapter.to_bytes())
    return PublishedAdapter(manifest, adapter, torrents, folder / adapter.name)


@contextmanager
def _staging(store: Store) -> Iterator[Path]:
    """A folder on the store's disk that is gone afterwards, come what may; translates what the disk says."""
    folder = store.data / "publishing-adapter"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"disk full while publishing into {store.data}; free some space there") from error
        raise storage_error(error, store.data) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
