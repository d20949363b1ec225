"""Getting block files: their torrents, from whichever peers say that they hold the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from torrentlm.errors import ArtifactError
from torrentlm.manifest.manifest import FileEntry, Manifest
from torrentlm.node.parts import Parts, Say
from torrentlm.node.peers import ModelPeers
from torrentlm.records import Span, spans_of
from torrentlm.swarm.transfer import Transfer

FEED_EVERY_S = 1.0
FEED_PAUSE_S = 0.1
DHT_LOOKUP_EVERY_S = 30.0
PROGRESS_EVERY_S = 0.5
WAITING_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Loading:
    """``done`` and ``total`` in bytes of the files asked for, ``rate`` in bytes per second."""

    done: int
    total: int
    rate: int


class BlockFiles:
    """The block files of one model on this node: on disk, or on their way. Announces and seeds what is complete."""

    def __init__(self, parts: Parts, peers: ModelPeers, manifest: Manifest, folder: Path) -> None:
        self._parts = parts
        self._peers = peers
        self._manifest = manifest
        self._folder = folder
        self._transfers: dict[str, Transfer] = {}
        self._checked: set[str] = set()
        self._coming: set[str] = set()
        self.changed = trio.Event()
        """Replaced by another one whenever it is set: more blocks are ready."""

    def held(self) -> list[int]:
        """Blocks whose every file is complete on disk."""
        store = self._parts.store
        blocks = range(len(self._manifest.blocks))
        return [block for block in blocks if all(store.holds(file.name) for file in self._manifest.block_files(block))]

    @property
    def ready(self) -> frozenset[int]:
        """Blocks whose every file is complete and has matched its hash since this node started."""
        blocks = range(len(self._manifest.blocks))
        return frozenset(
            block for block in blocks if all(file.name in self._checked for file in self._manifest.block_files(block))
        )

    def _is_ready(self, file: FileEntry) -> None:
        before = self.ready
        self._checked.add(file.name)
        if new := sorted(self.ready - before):
            self._parts.say({"event": "blocks", "state": "complete", "blocks": new})
        self.changed.set()
        self.changed = trio.Event()

    def paths(self, span: Span) -> dict[str, Path]:
        """Where the files of ``span`` lie, by name."""
        files = self._manifest.span_files(span.first, span.last)
        return {file.name: self._parts.store.path(file.name) for file in files}

    def seed_what_is_here(self) -> None:
        """Start the torrents of every complete file, fetched by an earlier session or published just now."""
        for file in self._manifest.files:
            if self._parts.store.holds(file.name):
                self._start(file, verified=True)
                self._announce(file)
        self._publish()

    async def fetch(self, files: Sequence[FileEntry]) -> None:
        """Return when all ``files`` are complete and verified on disk; they are seeded from then on.

        Raises StorageError if the disk or its budget cannot take them, ArtifactError if what a torrent says is not what
        the manifest says. Waits as long as it takes for somebody to have them, and says so.
        """
        store = self._parts.store
        await self._verify(files)
        store.require_space({file.name: file.size for file in files}, self._parts.config.disk)
        missing = [file for file in files if not store.holds(file.name)]
        if not missing:
            return
        self._coming |= {file.name for file in missing}
        self._publish()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, files)
            nursery.start_soon(self._feed, missing)
            nursery.start_soon(say_waiting, self._parts.say, partial(self._why_nothing_comes, missing))
            async with trio.open_nursery() as fetching:
                for file in missing:
                    fetching.start_soon(self._fetch_file, file)
            nursery.cancel_scope.cancel()

    async def _verify(self, files: Sequence[FileEntry]) -> None:
        """Hash what is on disk once a start: a bad disk alters a file without touching its size or time."""
        store = self._parts.store
        held = [file for file in files if file.name not in self._checked and store.holds(file.name)]
        total = sum(file.size for file in held)
        done = 0
        for file in held:
            self._say_progress("checking", done, total, 0)
            if await trio.to_thread.run_sync(store.matches, file.name):
                self._is_ready(file)
            else:
                store.mark_unverified(file.name)
            done += file.size
        self._publish()

    def _why_nothing_comes(self, files: Sequence[FileEntry]) -> str | None:
        """None while something comes, or while a peer says that it has something that is missing."""
        missing = {file.name for file in files if not self._parts.store.holds(file.name)}
        if any(self._transfers[name].progress.download_rate for name in missing if name in self._transfers):
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

    async def _fetch_file(self, file: FileEntry) -> None:
        self._parts.store.cut(file.name, file.size)
        if (running := self._transfers.get(file.name)) is not None:
            await running.recheck()  # it seeds what was thought complete
        transfer = running or self._start(file, verified=False)
        await transfer.wait_complete(stall_timeout=float("inf"))
        self._parts.store.mark_verified(file.name)
        self._is_ready(file)
        self._announce(file)
        self._coming.discard(file.name)
        self._publish()

    def _publish(self) -> None:
        blocks = range(len(self._manifest.blocks))
        coming = [block for block in blocks if any(f.name in self._coming for f in self._manifest.block_files(block))]
        self._peers.publish(held=spans_of(self.held()), fetching=spans_of(coming))

    def _start(self, file: FileEntry, *, verified: bool) -> Transfer:
        path = self._folder / "blocks" / f"{file.name}.torrent"
        try:
            torrent = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} is missing: delete {self._folder} and join again") from error
        transfer = self._parts.swarm.add_torrent(torrent, self._parts.store.blocks, verified=verified)
        if (transfer.v1, transfer.v2) != (file.v1, file.v2):
            raise ArtifactError(f"{path} is not the torrent that the manifest names: this magnet was published wrongly")
        self._transfers[file.name] = transfer
        return transfer

    def _announce(self, file: FileEntry) -> None:
        for info_hash in self._transfers[file.name].info_hashes:
            self._parts.swarm.dht.announce(info_hash, self._parts.gateway.endpoint.port)

    async def _feed(self, files: Sequence[FileEntry]) -> None:
        """Keep telling libtorrent who has what; it ignores those that it is connected to."""
        blocks_of = {file.name: set[int]() for file in files}
        for block in range(len(self._manifest.blocks)):
            for file in self._manifest.block_files(block):
                if file.name in blocks_of:
                    blocks_of[file.name].add(block)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_up, files)
            while True:
                candidates = self._peers.snapshot().candidates
                for file in files:
                    transfer = self._transfers.get(file.name)
                    if transfer is None or transfer.complete:
                        continue
                    for candidate in candidates:
                        spans = (*candidate.held, *candidate.fetching)
                        if any(block in span for span in spans for block in blocks_of[file.name]):
                            transfer.connect_peer(candidate.endpoint)
                changed = self._peers.heard
                await trio.sleep(FEED_PAUSE_S)
                with trio.move_on_after(FEED_EVERY_S - FEED_PAUSE_S):
                    await changed.wait()

    async def _look_up(self, files: Sequence[FileEntry]) -> None:
        """Ordinary clients that seed a block have no record: only the DHT knows of them."""
        while True:
            await trio.sleep(DHT_LOOKUP_EVERY_S / 3)
            for file in files:
                transfer = self._transfers.get(file.name)
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
            transfer = self._transfers.get(file.name)
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
