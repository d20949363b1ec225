"""Waiting for a route: the swarm is young or changing, so a missing block may be a matter of seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import trio

from torrentlm.errors import NoHolderError
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import NodeKey
from torrentlm.route.plan import Hop, Missing, plan_route
from torrentlm.route.registry import Snapshot

ROUTE_TIMEOUT_S = 30.0
POLL_S = 0.25


class Directory(Protocol):
    """Who holds what, as the client sees it."""

    manifest: Manifest

    def snapshot(self) -> Snapshot: ...

    def blame(self, node: NodeKey) -> None:
        """This holder failed: avoid it for a while."""


async def find_route(
    directory: Directory,
    side: int = 0,
    *,
    adapted: Collection[int] = (),
    timeout: float = ROUTE_TIMEOUT_S,
    waiting: Callable[[str], None] = lambda text: None,
) -> tuple[Hop, ...]:
    """The best route through one side of the model as soon as there is one; for the blocks ``adapted`` through holders
    that apply adapters.

    Raises NoHolderError, naming the first block that nobody serves, after ``timeout`` seconds; ``waiting`` hears that
    sentence whenever it changes before.
    """
    manifest = directory.manifest
    told = ""
    deadline = trio.current_time() + timeout
    while True:
        snapshot = directory.snapshot()
        route = plan_route(snapshot, manifest.side_blocks(side), adapted)
        if not isinstance(route, Missing):
            return route
        sentence = missing_sentence(manifest, route, snapshot, adapted)
        if sentence != told:
            told = sentence
            waiting(sentence)
        if trio.current_time() >= deadline:
            raise NoHolderError(sentence)
        await trio.sleep(POLL_S)


def missing_sentence(manifest: Manifest, missing: Missing, snapshot: Snapshot, adapted: Collection[int] = ()) -> str:
    """Which block is missing, and how many of the peers that we know of have said what they hold."""
    peers = f"{snapshot.answered} of {snapshot.known} known peers answered"
    advice = "start a holder for it with: torrentlm seed MAGNET --blocks " + str(missing.block)
    if snapshot.known == 0:
        peers, advice = "no peer is known", "check the network, or name a peer with --peer HOST:PORT"
    if missing.block in adapted and any(
        missing.block in span for peer in snapshot.candidates for span in (*peer.resident, *peer.offered)
    ):
        return (
            f"no peer that holds {manifest.block_label(missing.block)} applies adapters: start a holder for it with: "
            f"torrentlm seed MAGNET --blocks {missing.block} --adapters 200MB"
        )
    return f"no peer holds {manifest.block_label(missing.block)}; {peers}: {advice}"
