"""A node's part in one model, from the magnet to the blocks that it serves.

::

    magnet ─▶ model torrent ─▶ manifest ─▶ span to hold ─▶ block torrents ─▶ resident ─▶ record to all peers
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from torrentlm.compute.precision import Cost, Precisions
from torrentlm.compute.processor import instruction_sets
from torrentlm.errors import ArtifactError, ConfigError, NetworkError, StorageError
from torrentlm.manifest.adapter import FILE_NAME as ADAPTER_FILE_NAME
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import FILE_NAME, Manifest
from torrentlm.node.fetch import ALL_AT_ONCE, BlockFiles, say_waiting
from torrentlm.node.memory import offloadable, weights_bytes
from torrentlm.node.parts import Parts
from torrentlm.node.peers import ModelPeers
from torrentlm.node.precisions import (
    NOT_ASKED,
    Budget,
    asked_for,
    decide,
    enough,
    must_ask,
    must_measure,
    reason,
    smallest,
)
from torrentlm.node.sidecars import Sidecars
from torrentlm.records import Endpoint, InfoHash, NodeKey, PeerRecord, Span
from torrentlm.route.assign import beyond, choose_span, copies, extended
from torrentlm.route.registry import Snapshot
from torrentlm.structured import single_error
from torrentlm.swarm.addresses import is_address, resolve
from torrentlm.swarm.discovery import Source
from torrentlm.swarm.transfer import Transfer

FEED_EVERY_S = 0.5
RESOLVE_EVERY_S = 120.0
SETTLE_S = 5.0
"""How long an automatic choice of blocks waits for the records of the peers that are known."""
UNANSWERED_S = 120.0
"""After so long without an answer from anybody, the magnet or the network is wrong."""

Ask = Callable[[bool], Awaitable[Mapping[str, Cost]]]
"""Tells what each precision costs on the device that computes, measured if it is called with True, else only tried.
Called only where that may change something."""


class Membership:
    """One model on one node. After :meth:`run` has started, :attr:`peers` works; after :meth:`obtain`, the rest, but
    for :attr:`precisions`, which :meth:`choose` decides."""

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
        self._precisions: Precisions | None = None
        self.peers = ModelPeers(
            parts, self._hashes, PeerRecord(node=parts.key, model=self.id, port=parts.gateway.endpoint.port)
        )
        self.sidecars = Sidecars(parts, self.id, self._worth_asking)

    def snapshot(self) -> Snapshot:
        return self.peers.snapshot()

    def _worth_asking(self) -> list[NodeKey]:
        """Peers that are connected, those first that compute this model."""
        candidates = sorted(self.snapshot().candidates, key=lambda peer: (not peer.resident, not peer.has_blocks))
        return [peer.node for peer in candidates]

    @property
    def precisions(self) -> Precisions:
        """What was decided for the span that is held; as long as none was chosen, what the operator asked for."""
        return self._precisions or asked_for(self.manifest, self._parts.config)

    @property
    def ready(self) -> bool:
        """Whether the manifest is here."""
        return hasattr(self, "files")

    @property
    def holds(self) -> bool:
        """Whether this node serves blocks of it."""
        return bool(self.peers.record.resident)

    def uses(self, name: str) -> bool:
        """Whether a block file of this name is one of the model's, as far as the manifest is here."""
        return self.ready and self.files.entry(name) is not None

    def blame(self, node: NodeKey) -> None:
        """A holder failed: routes avoid it for a while."""
        self.peers.registry.failed(node, trio.current_time())

    async def run(self) -> None:
        """Find peers and talk with them, until cancelled."""
        self.peers.learn(self._parts.store.load_peers(), Source.LAST_SESSION)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._learn_named, self.magnet.peers, Source.MAGNET)
                nursery.start_soon(self._learn_named, self._parts.config.peers, Source.STATIC)
                await self.peers.run()
        finally:
            if reachable := self.peers.reachable():
                with suppress(StorageError):  # only the next start is slower for it, and this may hide why we end
                    self._parts.store.save_peers(reachable)

    async def _learn_named(self, endpoints: Sequence[Endpoint], source: Source) -> None:
        """Addresses are tried at once; names are looked up, and again and again, since they may move."""
        self.peers.learn(endpoints, source)
        while not all(is_address(endpoint.host) for endpoint in endpoints):
            self.peers.learn(await resolve(endpoints), source)
            await trio.sleep(RESOLVE_EVERY_S)

    async def obtain(self, timeout: float) -> None:
        """Get the model torrent (manifest, tokenizer, block torrents) from whoever has it, or from disk.

        Raises NetworkError if nobody sent it within ``timeout`` seconds, or if not a single peer has answered within
        ``UNANSWERED_S``; ArtifactError if it is not a model's. Says meanwhile why nothing comes.
        """
        store, swarm = self._parts.store, self._parts.swarm
        known = store.load_torrent(self.id)
        transfer = swarm.add_torrent(known or self.magnet, store.model_folder(self.id))
        with single_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed, transfer)
                nursery.start_soon(say_waiting, self._parts.say, partial(self._why_no_manifest, transfer))
                nursery.start_soon(self._give_up, transfer, timeout)
                torrent = await transfer.wait_metadata(float("inf"))
                await transfer.wait_complete(stall_timeout=float("inf"))
                nursery.cancel_scope.cancel()
        if known is None:
            store.save_torrent(self.id, torrent)
        self.folder = store.model_folder(self.id) / transfer.name
        try:
            self.manifest = Manifest.from_bytes((self.folder / FILE_NAME).read_bytes())
        except OSError as error:
            if (self.folder / ADAPTER_FILE_NAME).exists():
                raise ArtifactError(
                    "this magnet is an adapter's: name the model that it is for, and give this one to --adapter"
                ) from error
            raise ArtifactError("this magnet's torrent has no manifest: it is not a torrentlm model") from error
        self.files = BlockFiles(self._parts, self.peers, self.manifest, self.folder)
        self.files.seed_what_is_here()

    def _why_no_manifest(self, transfer: Transfer) -> str | None:
        if transfer.progress.download_rate:
            return None
        snapshot = self.snapshot()
        return (
            f"no peer has sent this model's manifest yet; {snapshot.answered} of {snapshot.known} known peers "
            "answered: check the magnet, or name a peer with --peer HOST:PORT"
        )

    async def _give_up(self, transfer: Transfer, timeout: float) -> None:
        """Raise NetworkError after ``timeout`` seconds, or sooner if nobody has answered by ``UNANSWERED_S``."""
        started = trio.current_time()
        answered = False
        while (waited := trio.current_time() - started) < (timeout if answered else min(timeout, UNANSWERED_S)):
            await trio.sleep(min(FEED_EVERY_S, timeout))
            answered = answered or self.snapshot().answered > 0 or transfer.progress.peers > 0
        snapshot = self.snapshot()
        raise NetworkError(
            f"no peer sent this model's manifest within {waited:.0f} s; {snapshot.answered} of {snapshot.known} "
            "known peers answered: check the magnet, or name a peer that has the model with --peer HOST:PORT"
        )

    async def _feed(self, transfer: Transfer) -> None:
        while True:
            for endpoint in self.peers.endpoints():
                transfer.connect_peer(endpoint)
            await trio.sleep(FEED_EVERY_S)

    async def choose(self, accelerator: int | None, ask: Ask, offload: Sequence[int] = ()) -> Span | None:
        """The span to hold, as configured; None for no block. Decides ``precisions``.

        ``accelerator``: bytes of its memory for weights, if one computes; ``offload``: of RAM for what each of
        several has no room for. Raises ConfigError, StorageError.
        """
        config, last = self._parts.config, len(self.manifest.blocks) - 1
        span, budget = config.blocks, Budget.of(config, accelerator, self._gained(offload))
        if span == "none":
            return None
        if not isinstance(span, Span):
            await self._settle()
            span, budget = await self._choose_span(budget, ask)
        elif span.last > last:
            raise ConfigError(f"--blocks {span} is past this model's end: it has blocks 0-{last}")
        costs = await self._costs(span, budget, ask)
        self._precisions = how = decide(self.manifest, config, span, budget, costs)
        if why := reason(self.manifest, config, span, budget, how, costs):
            self._parts.say({"event": "precision", "precision": how.said(span), "why": why})
        return span

    def _gained(self, offload: Sequence[int]) -> int:
        """What RAM for offloaded blocks, so much for each device, adds to their own memory."""
        if not any(offload):
            return 0
        in_memory = weights_bytes(self.manifest, self.precisions.compute, self.precisions.stored)
        sizes = offloadable(self.manifest, in_memory, Span(0, len(self.manifest.blocks) - 1))
        largest = max(sizes.values(), default=0)
        return sum(beyond(0, ram, largest) for ram in offload) if sizes else 0

    async def _costs(self, span: Span, budget: Budget, ask: Ask) -> Mapping[str, Cost]:
        asked = self.manifest, self._parts.config, span, budget
        if must_measure(*asked, instruction_sets()):
            return await ask(True)
        return await ask(False) if must_ask(*asked) else NOT_ASKED

    async def _choose_span(self, budget: Budget, ask: Ask) -> tuple[Span, Budget]:
        """The span that fits as published; where not even one block does, one that fits in the least that is allowed.

        With the budget: it binds then, whoever named it.
        """
        config, whole, guess = self._parts.config, Span(0, len(self.manifest.blocks) - 1), replace(budget, binds=False)
        kept = decide(self.manifest, config, whole, guess, await self._costs(whole, guess, ask))
        if config.precision == "auto" and min(sum(block.values()) for block in self._sizes(kept)) > budget.weights:
            kept, budget = smallest(self.manifest, config, await ask(False)), replace(budget, binds=True)
        return self._span_within(budget, kept), budget

    def _sizes(self, kept: Precisions) -> list[dict[str, int]]:
        """The files of each block, with what they take in memory."""
        in_memory = weights_bytes(self.manifest, kept.compute, kept.stored)
        files = [self.manifest.block_files(block) for block in range(len(self.manifest.blocks))]
        return [{file.name: in_memory[file.name] for file in block} for block in files]

    def _span_within(self, budget: Budget, kept: Precisions) -> Span:
        space, sizes = self._parts.shelf.space, self._sizes(kept)
        files = [self.manifest.block_files(block) for block in range(len(sizes))]
        missing = [{file.name: space.missing({file.name: file.size}) for file in block} for block in files]
        # What is here of this model is part of the choice; what is here of others may go for it.
        room = space.room(besides={file.name for file in self.manifest.files})
        copied = copies(self.snapshot(), len(sizes))
        span = choose_span(sizes, copied, budget.weights, missing=missing, room=room)
        if span is not None and budget.aside:
            more = budget.weights + budget.aside
            return extended(span, sizes, copied, more, missing=missing, room=room)
        if span is not None:
            return span
        least = min(sum(block.values()) for block in sizes)
        if least > budget.weights:
            raise ConfigError(
                f"the memory budget of {budget.weights / 1e6:,.1f} MB for weights does not hold even one block; "
                f"the smallest needs {least / 1e6:,.1f} MB in {kept.said(range(len(sizes)))}: raise --{budget.option} "
                f"to {enough(least):,.1f} MB"
            )
        least = min(sum(block.values()) for block in missing)
        raise StorageError(
            f"the {max(0, room) / 1e6:,.1f} MB left of the disk or of its budget do not hold even one more block; the "
            f"smallest needs {least / 1e6:,.1f} MB: raise --disk or free some space"
        )

    async def _settle(self) -> None:
        with trio.move_on_after(SETTLE_S):
            while (snapshot := self.snapshot()).answered == 0 or snapshot.answered < snapshot.known:  # noqa: ASYNC110
                await trio.sleep(FEED_EVERY_S)

    async def fetch(self, span: Span) -> None:
        """Get what is missing of ``span``, which stays from now on. Raises StorageError, ArtifactError."""
        self.peers.publish(claimed=(span,))
        self.files.keep(span)
        await self.files.fetch(self.manifest.span_files(span.first, span.last))

    async def mirror(self) -> None:
        """Get whatever is missing of the whole model. Raises StorageError, ArtifactError."""
        self.files.keep(Span(0, len(self.manifest.blocks) - 1))
        await self.files.fetch(self.manifest.files, at_once=ALL_AT_ONCE)
