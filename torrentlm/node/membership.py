"""A node's part in one model, from the magnet to the blocks that it serves.

::

    magnet ─▶ model torrent ─▶ manifest ─▶ span to hold ─▶ block torrents ─▶ resident ─▶ record to all peers
"""

from __future__ import annotations

from pathlib import Path

import trio

from torrentlm.errors import ArtifactError, ConfigError, NetworkError
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import FILE_NAME, Manifest
from torrentlm.node.fetch import BlockFiles
from torrentlm.node.memory import weights_budget
from torrentlm.node.parts import Parts
from torrentlm.node.peers import ModelPeers
from torrentlm.records import InfoHash, PeerRecord, Span
from torrentlm.route.assign import choose_span, copies
from torrentlm.route.registry import Snapshot
from torrentlm.swarm.discovery import Source
from torrentlm.swarm.transfer import Transfer

FEED_EVERY_S = 0.5
SETTLE_S = 5.0
"""How long an automatic choice of blocks waits for the records of the peers that are known."""


class Membership:
    """One model on one node. After :meth:`run` has started, :attr:`peers` works; after :meth:`obtain`, the rest."""

    manifest: Manifest
    files: BlockFiles
    folder: Path

    def __init__(self, parts: Parts, magnet: Magnet) -> None:
        if magnet.v1 is None or magnet.v2 is None:
            raise ArtifactError(
                "this magnet has only one of its two hashes: copy the whole link that torrentlm printed"
            )
        self.magnet = magnet
        self.id: bytes = magnet.v2
        self._hashes = (InfoHash(magnet.v1), InfoHash(magnet.v2[:20]))
        self._parts = parts
        self.peers = ModelPeers(
            parts, self._hashes, PeerRecord(node=parts.key, model=self.id, port=parts.gateway.endpoint.port)
        )

    def snapshot(self) -> Snapshot:
        return self.peers.snapshot()

    async def run(self) -> None:
        """Find peers and talk with them, until cancelled."""
        self.peers.learn(self.magnet.peers, Source.MAGNET)
        self.peers.learn(self._parts.config.peers, Source.STATIC)
        self.peers.learn(self._parts.store.load_peers(), Source.LAST_SESSION)
        try:
            await self.peers.run()
        finally:
            if reachable := self.peers.reachable():
                self._parts.store.save_peers(reachable)

    async def obtain(self, timeout: float) -> None:
        """Get the model torrent (manifest, tokenizer, block torrents) from whoever has it, or from disk.

        Raises NetworkError if nobody sent it within ``timeout`` seconds, ArtifactError if it is not a model's.
        """
        store, swarm = self._parts.store, self._parts.swarm
        known = store.load_torrent(self.id)
        transfer = swarm.add_torrent(known or self.magnet, store.model_folder(self.id))
        with trio.move_on_after(timeout) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, transfer)
                torrent = await transfer.wait_metadata(float("inf"))
                await transfer.wait_complete(stall_timeout=float("inf"))
                nursery.cancel_scope.cancel()
        if limit.cancelled_caught:
            snapshot = self.snapshot()
            raise NetworkError(
                f"no peer sent this model's manifest within {timeout:.0f} s; {snapshot.answered} of {snapshot.known} "
                "known peers answered: check the magnet, or name a peer that has the model with --peer HOST:PORT"
            )
        if known is None:
            store.save_torrent(self.id, torrent)
        self.folder = store.model_folder(self.id) / transfer.name
        try:
            self.manifest = Manifest.from_bytes((self.folder / FILE_NAME).read_bytes())
        except OSError as error:
            raise ArtifactError("this magnet's torrent has no manifest: it is not a torrentlm model") from error
        self.files = BlockFiles(self._parts, self.peers, self.manifest, self.folder)
        self.files.seed_what_is_here()

    async def _feed(self, transfer: Transfer) -> None:
        while True:
            for endpoint in self.peers.endpoints():
                transfer.connect_peer(endpoint)
            await trio.sleep(FEED_EVERY_S)

    async def choose(self) -> Span | None:
        """The span to hold, as configured; None for no block. Raises ConfigError if it cannot be."""
        blocks = len(self.manifest.blocks)
        wanted = self._parts.config.blocks
        if wanted == "none":
            return None
        if isinstance(wanted, Span):
            if wanted.last >= blocks:
                raise ConfigError(f"--blocks {wanted} is past this model's end: it has blocks 0-{blocks - 1}")
            return wanted
        await self._settle()
        sizes = [sum(file.size for file in self.manifest.block_files(block)) for block in range(blocks)]
        budget = weights_budget(self._parts.config)
        span = choose_span(sizes, copies(self.snapshot(), blocks), budget)
        if span is None:
            raise ConfigError(
                f"the memory budget of {budget / 1e6:.0f} MB for weights does not hold even one block; "
                f"the smallest needs {min(sizes) / 1e6:.0f} MB: raise --ram"
            )
        return span

    async def _settle(self) -> None:
        with trio.move_on_after(SETTLE_S):
            while (snapshot := self.snapshot()).answered == 0 or snapshot.answered < snapshot.known:  # noqa: ASYNC110
                await trio.sleep(FEED_EVERY_S)

    async def fetch(self, span: Span) -> None:
        """Get what is missing of ``span``. Raises StorageError, ArtifactError."""
        self.peers.publish(claimed=(span,))
        await self.files.fetch(self.manifest.span_files(span.first, span.last))
