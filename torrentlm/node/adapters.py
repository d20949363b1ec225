"""Adapters on this node: those that it publishes, and those that sessions bring along, within a budget and for a while.

::

    Open with an adapter ─▶ adapter torrent, from any peer of the base ─▶ its manifest ─▶ block torrents of the span
       ─▶ lent to the session ─▶ given back ─▶ kept until others need the room, or the node ends

A stranger chooses what is fetched here, so all of it is bounded before it is asked for: the torrent's size, the files'
sizes as their own torrents say them, how many fetch at once, and how long.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from torrentlm.errors import ArtifactError, NetworkError, RefusedError, StorageError
from torrentlm.holder.adapters import Borrowed
from torrentlm.manifest.adapter import FILE_NAME, AdapterManifest
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import MAX_BYTES, FileEntry
from torrentlm.manifest.torrent import Torrent
from torrentlm.node.membership import Membership
from torrentlm.node.memory import weights_bytes
from torrentlm.node.parts import Parts
from torrentlm.publish.adapter import PublishedAdapter
from torrentlm.records import AdapterId, Endpoint, InfoHash, Span
from torrentlm.structured import single_error
from torrentlm.swarm.transfer import Transfer, Urgency

FETCH_LIMIT_S = 30.0
"""For all that one session's adapter needs; a client waits a little longer (client/session.py)."""
MAX_FETCHES = 8
MAX_TORRENT_CONTENT = 16 << 20
"""Bytes of an adapter torrent: a manifest, and a small torrent for each block."""
FEED_EVERY_S = 0.5
MAX_FED = 32
"""Peers of the base that are asked at a time whether they have the adapter."""


@dataclass(slots=True)
class _Entry:
    """One adapter. ``own``: published here, so nothing of it is this cache's to count or to remove.

    ``failed``: something of it could not be had or kept, so the next session begins anew. ``size``: its torrent's.
    """

    id: AdapterId
    own: bool = False
    failed: bool = False
    users: int = 0
    size: int = 0
    transfer: Transfer | None = None
    folder: Path | None = None
    manifest: AdapterManifest | None = None
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def names(self) -> frozenset[str]:
        return frozenset() if self.manifest is None else frozenset(file.name for file in self.manifest.files)


class NodeAdapters:
    """One per node. What is fetched lies in ``<data>/adapters``, which starts out empty each time."""

    def __init__(self, parts: Parts, memberships: Mapping[bytes, Membership]) -> None:
        self._parts = parts
        self._memberships = memberships
        self._folder = parts.store.data / "adapters"
        self._entries: OrderedDict[AdapterId, _Entry] = OrderedDict()
        self._blocks: dict[str, tuple[Transfer, int]] = {}
        """Fetched block files by name, with what each counts for: bytes on disk or in memory, whichever is more."""
        self._fetching = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def kept(self) -> int:
        """Bytes that what was fetched here counts for."""
        torrents = sum(entry.size for entry in self._entries.values() if not entry.own)
        return torrents + sum(size for _, size in self._blocks.values())

    def share(self, published: PublishedAdapter) -> None:
        """Seed an adapter that was published here, for as long as the node runs."""
        store, swarm = self._parts.store, self._parts.swarm
        torrent = published.torrent
        entry = _Entry(AdapterId(torrent.v1, torrent.v2), own=True, users=1)
        entry.transfer = swarm.add_torrent(torrent.to_bytes(), store.model_folder(torrent.v2), verified=True)
        entry.folder, entry.manifest = published.folder, published.manifest
        self._entries[entry.id] = entry
        self._parts.shelf.space.pin(entry.names, entry.id)
        transfers = [entry.transfer]
        transfers += [swarm.add_torrent(each.to_bytes(), store.blocks, verified=True) for each in published.torrents]
        for transfer in transfers:
            for info_hash in transfer.info_hashes:
                swarm.dht.announce(info_hash, self._parts.gateway.endpoint.port)

    async def manifest(self, membership: Membership, adapter: AdapterId) -> AdapterManifest:
        """An adapter's manifest, for a client; from then on this node hands it on to the holders that ask for it.

        Raises NetworkError if it does not come in time, ArtifactError if it is no adapter or made for another model.
        """
        entry = self._entries.setdefault(adapter, _Entry(adapter))
        entry.users += 1
        try:
            with trio.fail_after(FETCH_LIMIT_S):
                async with entry.lock:
                    return await self._obtain(entry, membership)
        except trio.TooSlowError:
            self._give_back(entry)
            raise NetworkError(_LATE) from None
        except BaseException:
            self._give_back(entry)
            raise

    async def borrow(self, model: bytes, adapter: AdapterId, span: Span) -> Borrowed:
        """See holder/adapters.py."""
        membership = self._memberships.get(model)
        if membership is None:
            raise RefusedError("this peer holds no block of that model", "wrong_model")
        if self._fetching >= MAX_FETCHES:
            raise RefusedError("this holder is fetching other adapters: try again later", "busy")
        entry = self._entries.setdefault(adapter, _Entry(adapter))
        entry.users += 1
        self._fetching += 1
        lent = False
        try:
            with trio.fail_after(FETCH_LIMIT_S):
                async with entry.lock:
                    manifest = await self._obtain(entry, membership)
                    await self._fetch(entry, manifest, span, membership)
            lent = True
            self._entries.move_to_end(adapter)
            return self._lend(entry, manifest, span)
        except trio.TooSlowError:
            raise RefusedError(_LATE, "no_adapter") from None
        except StorageError as error:
            raise RefusedError(f"this holder cannot keep the adapter: {error}", "memory") from error
        except (ArtifactError, NetworkError) as error:
            raise RefusedError(str(error), "no_adapter") from error
        finally:
            self._fetching -= 1
            if not lent:
                entry.failed = True
                self._give_back(entry)

    def _lend(self, entry: _Entry, manifest: AdapterManifest, span: Span) -> Borrowed:
        files = []
        scalings: dict[str, float] = {}
        for part in manifest.within(span):
            files.append((self._path(manifest.files[part.used.file].name), part.used.names))
            scalings |= manifest.scalings(part)
        return Borrowed(tuple(files), scalings, lambda: self._give_back(entry))

    def _has(self, name: str) -> bool:
        return name in self._blocks or self._parts.store.holds(name)

    def _path(self, name: str) -> Path:
        return self._folder / "blocks" / name if name in self._blocks else self._parts.store.path(name)

    def _give_back(self, entry: _Entry) -> None:
        entry.users -= 1
        if not entry.users and (entry.failed or entry.manifest is None):
            self._forget(entry)

    # -- fetching

    async def _obtain(self, entry: _Entry, membership: Membership) -> AdapterManifest:
        """The manifest, once the adapter torrent is here and fits the model. Raises ArtifactError, StorageError."""
        if entry.manifest is None:
            transfer = entry.transfer or self._start(entry)
            await self._complete(entry, [transfer], membership)
            if (transfer.v1, transfer.v2) != (entry.id.v1, entry.id.v2):
                raise ArtifactError("the adapter's two hashes name different torrents: copy its whole magnet")
            entry.folder = transfer.folder / transfer.name
            try:
                with (entry.folder / FILE_NAME).open("rb") as file:
                    content = file.read(MAX_BYTES + 1)
            except OSError as error:
                raise ArtifactError("this magnet is not one of a torrentlm adapter") from error
            entry.manifest = AdapterManifest.from_bytes(content)
            entry.size = sum(path.stat().st_size for path in entry.folder.rglob("*") if path.is_file())
            self._parts.shelf.space.pin(entry.names, entry.id)  # some may be block files of this node's
        if entry.manifest.base.v2 != membership.id:
            raise ArtifactError(
                f"the adapter {entry.manifest.name} was made for another model, not for {membership.manifest.name}"
            )
        return entry.manifest

    def _start(self, entry: _Entry) -> Transfer:
        self._refuse_others((entry.id.v1, entry.id.v2))
        magnet = Magnet(entry.id.v1, entry.id.v2)
        folder = self._folder / entry.id.v2.hex()
        entry.transfer = self._parts.swarm.add_torrent(magnet, folder, limit=MAX_TORRENT_CONTENT, urgency=Urgency.NOW)
        return entry.transfer

    def _refuse_others(self, hashes: tuple[bytes, bytes]) -> None:
        """What runs here for another reason is no adapter, and must not end with one."""
        if any(self._parts.swarm.canonical(InfoHash(found[:20])) is not None for found in hashes):
            raise ArtifactError("this magnet is not one of a torrentlm adapter")

    async def _fetch(self, entry: _Entry, manifest: AdapterManifest, span: Span, membership: Membership) -> None:
        """Get the block files of ``span`` that are missing. Raises RefusedError, ArtifactError, StorageError."""
        files = manifest.span_files(span)
        missing = [file for file in files if not self._has(file.name)]
        torrents = [self._read_torrent(entry, file) for file in missing]
        in_memory = weights_bytes(manifest, membership.precisions.compute)
        sizes = {file.name: max(file.size, in_memory[file.name]) for file in missing}
        self._make_room(sum(sizes.values()))
        self._parts.shelf.space.require_free(sum(file.size for file in missing))
        for file, torrent in zip(missing, torrents, strict=True):
            self._refuse_others((file.v1, file.v2))
            transfer = self._parts.swarm.add_torrent(torrent, self._folder / "blocks", urgency=Urgency.NOW)
            self._blocks[file.name] = transfer, sizes[file.name]
        fetched = [self._blocks[file.name][0] for file in files if file.name in self._blocks]
        await self._complete(entry, fetched, membership)

    def _read_torrent(self, entry: _Entry, file: FileEntry) -> bytes:
        assert entry.folder is not None  # noqa: S101  it has its manifest
        try:
            content = (entry.folder / "blocks" / f"{file.name}.torrent").read_bytes()
        except OSError as error:
            raise ArtifactError("the adapter's torrent lacks one of its blocks': it was published wrongly") from error
        torrent = Torrent.from_bytes(content)
        if (torrent.name, torrent.size, torrent.v1, torrent.v2) != (file.name, file.size, file.v1, file.v2):
            raise ArtifactError(
                "the adapter's torrents are not those that its manifest names: it was published wrongly"
            )
        return content

    def _make_room(self, needed: int) -> None:
        """Forget unused adapters, the longest unused first, until ``needed`` bytes more fit. Raises RefusedError."""
        budget = self._parts.config.adapters
        for other in tuple(self._entries.values()):
            if self.kept + needed <= budget:
                break
            if not other.users:
                self._forget(other)
        if self.kept + needed > budget:
            raise RefusedError(
                f"the adapter's {needed / 1e6:.2f} MB do not fit: this holder keeps {budget / 1e6:.2f} MB of adapters, "
                f"and sessions use {self.kept / 1e6:.2f} MB of them",
                "memory",
            )

    def _forget(self, entry: _Entry) -> None:
        """Stop and remove what was fetched of an adapter, but for files that another one has too."""
        if entry.own:
            return
        self._entries.pop(entry.id, None)
        self._parts.shelf.space.unpin(entry.names, entry.id)
        others = frozenset[str]().union(*(other.names for other in self._entries.values() if not other.own))
        for name in entry.names - others:
            if name in self._blocks:
                path = self._path(name)
                transfer, _ = self._blocks.pop(name)
                self._parts.swarm.remove(transfer)
                with suppress(OSError):
                    path.unlink()
        if entry.transfer is not None:
            self._parts.swarm.remove(entry.transfer)
            shutil.rmtree(self._folder / entry.id.v2.hex(), ignore_errors=True)

    async def _complete(self, entry: _Entry, transfers: Sequence[Transfer], membership: Membership) -> None:
        """Return when all are here; they come from the base's peers, and from whoever the DHT names for the adapter."""
        with single_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_feed, transfers, membership)
                nursery.start_soon(self._look_up, entry.id, transfers)
                for transfer in transfers:
                    await transfer.wait_complete(stall_timeout=float("inf"))
                nursery.cancel_scope.cancel()

    async def _look_up(self, adapter: AdapterId, transfers: Sequence[Transfer]) -> None:
        hashes = (InfoHash(adapter.v1), InfoHash(adapter.v2[:20]))
        _connect(await self._parts.swarm.dht.find_peers(hashes), transfers)


async def _feed(transfers: Sequence[Transfer], membership: Membership) -> None:
    """Keep asking peers of the base, some at a time; libtorrent ignores those that it is connected to."""
    first = 0
    while True:
        endpoints = membership.peers.endpoints()
        _connect(endpoints[first : first + MAX_FED], transfers)
        first = first + MAX_FED if first + MAX_FED < len(endpoints) else 0
        await trio.sleep(FEED_EVERY_S)


def _connect(endpoints: Sequence[Endpoint], transfers: Sequence[Transfer]) -> None:
    for endpoint in endpoints:
        for transfer in transfers:
            if not transfer.complete:
                transfer.connect_peer(endpoint)


_LATE = (
    f"the adapter did not come within {FETCH_LIMIT_S:.0f} s: check its magnet, and that a node that has it is running "
    "and knows this model's swarm"
)
