"""The block files of this node, whatever models they are in: what is here is seeded, what goes is withdrawn first.

A model's view of it is ``fetch.BlockFiles``. Two models that share a file share its transfer, its announcement and its
pins, so that what one of them lets go stays as long as the other needs it.

An eviction, in an order that a kill may break off anywhere: the file is out of the store's records; nobody is told of
it any more (records, DHT); libtorrent has let go of it; it is removed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from torrentlm.errors import ArtifactError, DiskFullError
from torrentlm.gateway.gateway import Gateway
from torrentlm.manifest.manifest import FileEntry
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.space import Space
from torrentlm.swarm.store import Store
from torrentlm.swarm.transfer import Transfer, Urgency

ROOM_EVERY_S = 2.0
"""How often a full disk is asked again."""


class Shelf:
    """``warn`` is told, in one sentence, when the disk is full."""

    def __init__(self, store: Store, space: Space, swarm: Swarm, gateway: Gateway, warn: Callable[[str], None]) -> None:
        self.space = space
        self.transfers: dict[str, Transfer] = {}
        """By the file's name: what is here or on its way."""
        self._store = store
        self._swarm = swarm
        self._gateway = gateway
        self._warn = warn
        self._watchers: list[Callable[[], None]] = []
        self._deciding = trio.Lock()
        self._fetching: dict[str, trio.Lock] = {}
        self._full = False

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` whenever a file became complete or ceased to be here."""
        self._watchers.append(changed)

    # -- what is here

    def start(self, file: FileEntry, folder: Path, *, verified: bool, urgency: Urgency = Urgency.NORMAL) -> Transfer:
        """The file's torrent, from the model torrent in ``folder``; the one that runs if one does.

        Raises ArtifactError if it is not there or not the one that the manifest names.
        """
        if (running := self.transfers.get(file.name)) is not None:
            return running
        path = folder / "blocks" / f"{file.name}.torrent"
        try:
            torrent = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} is missing: delete {folder} and join again") from error
        transfer = self._swarm.add_torrent(torrent, self._store.blocks, verified=verified, urgency=urgency)
        if (transfer.v1, transfer.v2) != (file.v1, file.v2):
            raise ArtifactError(f"{path} is not the torrent that the manifest names: this magnet was published wrongly")
        self.transfers[file.name] = transfer
        return transfer

    def seed(self, files: Iterable[FileEntry], folder: Path) -> None:
        """Seed and announce those that are complete, without reading them: they have not changed since."""
        for file in files:
            if self._store.holds(file.name):
                self.start(file, folder, verified=True)
                self._announce(file.name)

    def completed(self, name: str) -> None:
        """The file that is being fetched is all here. Raises StorageError if that cannot be written down."""
        self._store.mark_verified(name)
        self.space.used([name])
        self._announce(name)
        self._tell()

    def damaged(self, name: str) -> None:
        """The file is not what its name says: nobody is told of it any more, and libtorrent serves nothing of it."""
        self.space.withdraw(name)
        self._unannounce(name)
        if transfer := self.transfers.get(name):
            transfer.stop_serving()
        self._tell()

    def _announce(self, name: str) -> None:
        for info_hash in self.transfers[name].info_hashes:
            self._swarm.dht.announce(info_hash, self._gateway.endpoint.port)

    def _unannounce(self, name: str) -> None:
        if transfer := self.transfers.get(name):
            for info_hash in transfer.info_hashes:
                self._swarm.dht.withdraw(info_hash)

    def _tell(self) -> None:
        for changed in self._watchers:
            changed()

    # -- what goes

    async def evict(self, names: Iterable[str]) -> None:
        """Withdraw these files, then remove them. Raises StorageError if one cannot be removed."""
        names = tuple(names)
        for name in names:
            self.space.withdraw(name)
            self._stop(name)
        if names:
            self._tell()
        with trio.CancelScope(shield=True):
            for name in names:
                await trio.to_thread.run_sync(self.space.remove, name)

    def _stop(self, name: str) -> None:
        self._unannounce(name)
        if transfer := self.transfers.pop(name, None):
            self._swarm.remove(transfer)

    # -- what comes

    @asynccontextmanager
    async def room_for(self, files: Mapping[str, int]) -> AsyncIterator[None]:
        """Room for these files (name: size in bytes) while the context lasts, made by evicting others.

        What is not complete at its end is not fetched any more, unless somebody else wants it; what came stays on the
        disk. Raises StorageError.
        """
        async with self._deciding:
            going = self.space.make_room(files)
            self.space.promise(files)
            try:
                await self.evict(going)
            except BaseException:
                self.space.take_back(files)
                raise
        try:
            yield
        finally:
            for name in self.space.take_back(files):
                if not self._store.holds(name):
                    self._stop(name)

    @asynccontextmanager
    async def alone(self, name: str) -> AsyncIterator[None]:
        """One fetches a file at a time; who comes later finds it complete."""
        lock = self._fetching.setdefault(name, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._fetching.pop(name, None)

    async def wait_for_room(self, name: str, size: int) -> None:
        """The disk is full. Evict what may be evicted, and return when there is room for the rest of this file."""
        self._say_full()
        while True:
            try:
                async with self._deciding:
                    await self.evict(self.space.make_any_room())
            except DiskFullError:
                pass
            # Always a while: a quota may be used up where the disk says that it has room.
            await trio.sleep(ROOM_EVERY_S)
            if self.space.fits(name, size):
                self._full = False
                return

    def _say_full(self) -> None:
        if not self._full:
            self._full = True
            self._warn(
                f"disk full: fetching into {self._store.blocks} pauses, and goes on by itself when there is room; "
                "free some space there"
            )
