"""``torrentlm seed``: a node that publishes or joins, holds and serves, and says how that goes.

The events are those of docs/cli.md; each is a plain dict with a key ``event``.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import trio

from torrentlm.config import AdapterRecipe, Recipe, Settings
from torrentlm.manifest.magnet import Magnet
from torrentlm.node.membership import Membership
from torrentlm.node.node import Node, open_node
from torrentlm.node.parts import Say
from torrentlm.node.status import keep_status
from torrentlm.publish.adapter import adapter_event, publish_adapter
from torrentlm.publish.run import Pace, published_event, run
from torrentlm.records import Endpoint
from torrentlm.structured import single_error

WATCH_EVERY_S = 1.0
ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104  # to compare with


async def seed(settings: Settings, say: Say) -> None:
    """Run until cancelled. Raises what keeps it from serving: any TorrentLMError."""
    async with open_node(settings.node, say) as node:
        node.parts.store.save_endpoint(reachable_endpoint(node))
        try:
            if settings.recipe is not None:
                magnet = await _publish(node, settings.recipe, say)
                await node.pin_published()
            else:
                magnet = Magnet.parse(settings.magnet or "")
            say({"event": "starting", "name": magnet.name, "magnet": str(magnet), "port": node.endpoint.port})
            membership = await node.join(magnet, timeout=float("inf"))
            say({"event": "joined", "name": membership.manifest.name, "blocks_total": len(membership.manifest.blocks)})
            for adapter in settings.adapters:
                await _publish_adapter(node, membership, adapter, say)
            await node.seed_all()
            with single_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(keep_status, node)
                    await node.hold(membership)
                    node.fetch_ahead()
                    node.check_disk()
                    say(_ready(node, membership))
                    await _watch(node, membership, say)
        finally:
            say({"event": "stopped"})


def reachable_endpoint(node: Node) -> Endpoint:
    """Where programs of this machine reach the node."""
    host = node.parts.config.host
    return Endpoint("127.0.0.1" if host in ANY_ADDRESS else host, node.endpoint.port)


async def _publish(node: Node, recipe: Recipe, say: Say) -> Magnet:
    pace = Pace(time.monotonic)

    def progress(done: int, total: int, what: str) -> None:
        trio.from_thread.check_cancelled()  # where a cancelled publishing ends
        if (event := pace(done, total, what)) is not None:
            trio.from_thread.run_sync(say, event)

    published = await trio.to_thread.run_sync(run, recipe, node.parts.store, progress, node.parts.config.allow_code)
    say(published_event(published))
    return published.magnet


async def _publish_adapter(node: Node, membership: Membership, recipe: AdapterRecipe, say: Say) -> None:
    published = await trio.to_thread.run_sync(
        publish_adapter, recipe, membership.magnet, membership.manifest, node.parts.store
    )
    node.adapters.share(published)
    say(adapter_event(published))


def _ready(node: Node, membership: Membership) -> dict[str, Any]:
    blocks = [block for span in membership.peers.record.resident for block in span]
    return {
        "event": "ready",
        "name": membership.manifest.name,
        "magnet": str(shared_magnet(node, membership)),
        "port": node.endpoint.port,
        "blocks": blocks,
        "held": membership.files.held(),
        "blocks_total": len(membership.manifest.blocks),
    }


def shared_magnet(node: Node, membership: Membership) -> Magnet:
    """The model's magnet with this node as a peer to begin with, if it has an address that others can use."""
    host = node.parts.config.host
    if host in ANY_ADDRESS:
        return membership.magnet
    own = Endpoint(host, node.endpoint.port)
    return replace(membership.magnet, peers=tuple(dict.fromkeys((own, *membership.magnet.peers))))


async def _watch(node: Node, membership: Membership, say: Say) -> None:
    """Say when a peer comes, changes or goes, when sessions do, and what passes through."""
    known: dict[str, list[int]] = {}
    sessions = 0
    before: tuple[int, int] = (0, 0)
    while True:
        now = {
            str(peer.endpoint): sorted({block for span in peer.resident for block in span})
            for peer in membership.snapshot().candidates
        }
        for peer, blocks in now.items():
            if known.get(peer) != blocks:
                say({"event": "peer", "peer": peer, "blocks": blocks, "connected": True})
        for peer in known.keys() - now.keys():
            say({"event": "peer", "peer": peer, "connected": False})
        known = now
        if node.sessions != sessions:
            state = "open" if node.sessions > sessions else "closed"
            sessions = node.sessions
            say({"event": "session", "state": state, "sessions": sessions})
        transfers = node.parts.swarm.transfers
        rates = (
            sum(transfer.progress.download_rate for transfer in transfers),
            sum(transfer.progress.upload_rate for transfer in transfers),
        )
        if rates != before:
            before = rates
            say({"event": "rates", "download": rates[0], "upload": rates[1]})
        await trio.sleep(WATCH_EVERY_S)
