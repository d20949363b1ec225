"""Getting block files: their torrents, from whichever peers say that they hold the blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from torrentlm.errors import DiskFullError
from torrentlm.manifest.manifest import FileEntry, Manifest
from torrentlm.node.parts import Parts, Say
from torrentlm.node.peers import ModelPeers
from torrentlm.records import Span, spans_of
from torrentlm.swarm.transfer import Urgency

FEED_EVERY_S = 1.0
FEED_PAUSE_S = 0.1
DHT_LOOKUP_EVERY_S = 30.0
PROGRESS_EVERY_S = 0.5
WAITING_EVERY_S = 5.0
AT_ONCE = 4
"""Files that come at a time."""
ALL_AT_ONCE = 64
"""The same where no file is wanted before the others: the more there are, the more evenly joiners share out whom a
source gives what (gateway/turns.py)."""
BEGIN_S = 3.0
TURN_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Loading:
    """``done`` and ``total`` in bytes of the files asked for, ``rate`` in bytes per second."""

    done: int
    total: int
    rate: int


class BlockFiles:
    """The block files of one model on this node: on disk, or on their way. The shelf seeds what is complete."""

    def __init__(self, parts: Parts, peers: ModelPeers, manifest: Manifest, folder: Path) -> None:
        self._parts = parts
        self._peers = peers
        self._manifest = manifest
        self._folder = folder
        self._shelf = parts.shelf
        self._coming: set[str] = set()
        self._said: frozenset[int] = frozenset()
        self._blocks_of: dict[str, set[int]] = {file.name: set() for file in manifest.files}
        for block in range(len(manifest.blocks)):
            for file in manifest.block_files(block):
                self._blocks_of[file.name].add(block)
        self.changed = trio.Event()
        """Replaced by another one whenever it is set: other blocks are ready than before."""
        self._shelf.watch(self._publish)

    def held(self) -> list[int]:
        """Blocks whose every file is complete on disk."""
        store = self._parts.store
        blocks = range(len(self._manifest.blocks))
        return [block for block in blocks if all(store.holds(file.name) for file in self._manifest.block_files(block))]

    @property
    def ready(self) -> frozenset[int]:
        """``held``, for those that ask whether a block is among them."""
        return frozenset(self.held())

    def entry(self, name: str) -> FileEntry | None:
        """The model's file of this name, if it has one."""
        return next((file for file in self._manifest.files if file.name == name), None)

    def paths(self, span: Span) -> dict[str, Path]:
        """Where the files of ``span`` lie, by name. They stay there until ``release``: who asks will map them."""
        self.keep(span)
        return {name: self._parts.store.path(name) for name in self._names(span)}

    def keep(self, span: Span) -> None:
        """Evict nothing of ``span``, here or still to come, until ``release``. It counts as used now."""
        for block in span:
            self._shelf.space.pin(self._names(Span(block, block)), (self._peers.record.model, block))
        self._shelf.space.used(self._names(span))

    def release(self, span: Span) -> None:
        """Nothing maps or wants these blocks any more: their files may go when others come, if nobody else needs them.

        They count as used until now.
        """
        for block in span:
            self._shelf.space.unpin(self._names(Span(block, block)), (self._peers.record.model, block))
        self._shelf.space.used(self._names(span))

    def _names(self, span: Span) -> list[str]:
        return [file.name for file in self._manifest.span_files(span.first, span.last)]

    def seed_what_is_here(self) -> None:
        """Start the torrents of every complete file, fetched by an earlier session or published just now."""
        self._shelf.seed(self._manifest.files, self._folder)
        self._publish()

    async def fetch(
        self, files: Sequence[FileEntry], *, urgency: Urgency = Urgency.NORMAL, at_once: int = AT_ONCE
    ) -> None:
        """Return when all ``files`` are complete on disk; they are seeded from then on. In the background, silently:
        then a full disk is an error. They come ``at_once`` so many at a time, in their order.

        Others are evicted for them. Raises StorageError if that is not enough, ArtifactError if what a torrent says is
        not what the manifest says. Waits as long as it takes for somebody to have them, or for a full disk to have
        room, and says so.
        """
        store = self._parts.store
        async with self._shelf.room_for({file.name: file.size for file in files}):
            missing = [file for file in files if not store.holds(file.name)]
            if not missing:
                return
            names = {file.name for file in missing}
            self._coming |= names
            self._publish()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, missing)
                if urgency is not Urgency.BACKGROUND:
                    nursery.start_soon(self._report, files)
                    nursery.start_soon(say_waiting, self._parts.say, partial(self._why_nothing_comes, missing))
                try:
                    async with trio.open_nursery() as fetching:
                        await self._fetch_in_turn(missing, urgency, at_once, fetching)
                finally:
                    self._coming -= names
                nursery.cancel_scope.cancel()
            self._publish()

    async def hash(self, blocks: Collection[int]) -> list[FileEntry]:
        """Hash what is on disk of these blocks now; the files that are damaged, which are withdrawn."""
        store = self._parts.store
        damaged = []
        for file in {file.name: file for block in blocks for file in self._manifest.block_files(block)}.values():
            if store.holds(file.name) and not await trio.to_thread.run_sync(store.matches, file.name):
                self._shelf.damaged(file.name)
                damaged.append(file)
        return damaged

    def _why_nothing_comes(self, files: Sequence[FileEntry]) -> str | None:
        """None while something comes, or while a peer says that it has something that is missing."""
        missing = {file.name for file in files if not self._parts.store.holds(file.name)}
        if any(self._shelf.transfers[name].progress.download_rate for name in missing if name in self._shelf.transfers):
            return None
        numbers = range(len(self._manifest.blocks))
        blocks = [number for number in numbers if missing & {file.name for file in self._manifest.block_files(number)}]
        snapshot = self._peers.snapshot()
        if not blocks or any(block in span for peer in snapshot.candidates for span in peer.held for block in blocks):
            return None
        which = ", ".join(str(span) for span in spans_of(blocks))
        return (
            f"no peer has the files of blocks {which}; {snapshot.answered} of {snapshot.known} known peers answered: "
            "start a node that has them, or name one with --peer HOST:PORT"
        )

    async def _fetch_in_turn(
        self, files: Sequence[FileEntry], urgency: Urgency, at_once: int, nursery: trio.Nursery
    ) -> None:
        """Few at a time, so that the first can be used while others have not begun. One that nobody sends counts no
        more after a while, and comes when somebody does.
        """
        begun: dict[str, float] = {}

        def is_moving(name: str) -> bool:
            if self._parts.store.holds(name):
                return False
            transfer = self._shelf.transfers.get(name)
            young = trio.current_time() - begun[name] < BEGIN_S
            return young or (transfer is not None and transfer.progress.download_rate > 0)

        for file in files:
            begun[file.name] = trio.current_time()
            nursery.start_soon(self._fetch_file, file, urgency)
            while sum(map(is_moving, begun)) >= at_once:  # noqa: ASYNC110
                await trio.sleep(TURN_EVERY_S)

    async def _fetch_file(self, file: FileEntry, urgency: Urgency) -> None:
        store, shelf = self._parts.store, self._shelf
        if (running := shelf.transfers.get(file.name)) is not None and urgency > running.urgency:
            running.urge(urgency)  # whoever fetches it was in less of a hurry
        async with shelf.alone(file.name):
            if store.holds(file.name):
                return
            store.cut(file.name, file.size)
            if (running := shelf.transfers.get(file.name)) is not None:
                await running.recheck()  # it seeds what was thought complete
            transfer = running or shelf.start(file, self._folder, verified=False, urgency=urgency)
            transfer.urge(urgency)
            self._introduce(file)  # at once, and not at the next turn of those who feed
            while not store.holds(file.name):
                try:
                    await transfer.wait_complete(stall_timeout=float("inf"))
                    shelf.completed(file.name)
                except DiskFullError:
                    if transfer.urgency is Urgency.BACKGROUND:
                        raise  # nothing is evicted for it
                    await shelf.wait_for_room(file.name, file.size)
                    transfer.resume()

    def _publish(self) -> None:
        blocks = range(len(self._manifest.blocks))
        coming = [block for block in blocks if any(f.name in self._coming for f in self._manifest.block_files(block))]
        held = self.ready
        self._peers.publish(held=spans_of(held), fetching=spans_of(set(coming) - held))
        if self._coming and (new := sorted(held - self._said)):
            self._parts.say({"event": "blocks", "state": "complete", "blocks": new})
        self._said = held
        self.changed.set()
        self.changed = trio.Event()

    async def _feed(self, files: Sequence[FileEntry]) -> None:
        """Keep telling libtorrent who has what; it ignores those that it is connected to."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_up, files)
            while True:
                for file in files:
                    self._introduce(file)
                changed = self._peers.heard
                await trio.sleep(FEED_PAUSE_S)
                with trio.move_on_after(FEED_EVERY_S - FEED_PAUSE_S):
                    await changed.wait()

    def _introduce(self, file: FileEntry) -> None:
        """Tell this file's transfer, if it runs, who has the file or is fetching it."""
        transfer = self._shelf.transfers.get(file.name)
        if transfer is None or transfer.complete:
            return
        for candidate in self._peers.snapshot().candidates:
            spans = (*candidate.held, *candidate.fetching)
            if any(block in span for span in spans for block in self._blocks_of[file.name]):
                transfer.connect_peer(candidate.endpoint)

    async def _look_up(self, files: Sequence[FileEntry]) -> None:
        """Ordinary clients that seed a block have no record: only the DHT knows of them."""
        while True:
            await trio.sleep(DHT_LOOKUP_EVERY_S / 3)
            for file in files:
                transfer = self._shelf.transfers.get(file.name)
                if transfer is None or transfer.complete or transfer.progress.download_rate > 0:
                    continue
                for endpoint in await self._parts.swarm.dht.find_peers(transfer.info_hashes):
                    transfer.connect_peer(endpoint)
            await trio.sleep(DHT_LOOKUP_EVERY_S)

    async def _report(self, files: Sequence[FileEntry]) -> None:
        while True:
            loading = self.loading(files)
            self._say_progress("fetching", loading.done, loading.total, loading.rate)
            await trio.sleep(PROGRESS_EVERY_S)

    def _say_progress(self, what: str, done: int, total: int, rate: int) -> None:
        self._parts.say({"event": "progress", "what": what, "done": done, "total": total, "rate": rate})

    def loading(self, files: Sequence[FileEntry]) -> Loading:
        done = rate = 0
        for file in files:
            transfer = self._shelf.transfers.get(file.name)
            if self._parts.store.holds(file.name):
                done += file.size
            elif transfer is not None:
                done += transfer.progress.done
                rate += transfer.progress.download_rate
        return Loading(done, sum(file.size for file in files), rate)


async def say_waiting(say: Say, why: Callable[[], str | None]) -> None:
    """Say why nothing comes, whenever that changes, until cancelled. ``why`` returns None while something does."""
    said = None
    while True:
        await trio.sleep(WAITING_EVERY_S)
        sentence = why()
        if sentence is not None and sentence != said:
            say({"event": "waiting", "why": sentence})
        said = sentence
