"""A node fetches ahead in the background: within its part of the disk, and never in the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e import checkpoint
from tests.swarm.nodes import in_trio
from torrentlm.config import NodeConfig, Recipe
from torrentlm.node import prefetch
from torrentlm.node.membership import Membership
from torrentlm.node.node import Node, open_node
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.swarm.transfer import Urgency

LAYERS = 12
BLOCKS = LAYERS + 2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    folder = tmp_path_factory.mktemp("published")
    base = checkpoint.make(folder / "base", LAYERS)
    with Store(folder / "data") as store:
        return folder / "data", publish(Recipe("base", base), store)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "START_AFTER_S", 0.0)
    monkeypatch.setattr(prefetch, "PLAN_EVERY_S", 0.2)
    monkeypatch.setattr(prefetch, "LEAST_RATE", 10_000_000)


@asynccontextmanager
async def holding(
    published: tuple[Path, Published], folder: Path, span: Span, **config: Any
) -> AsyncIterator[tuple[Node, Membership]]:
    """A node that holds ``span`` as far as others can tell, and a publisher that has everything."""

    def settings(data: Path, *peers: Any, **more: Any) -> NodeConfig:
        return NodeConfig(data, "127.0.0.1", 0, peers, (), "none", **more)

    data, model = published
    async with open_node(settings(data)) as publisher:
        await publisher.join(model.magnet, timeout=30)
        async with open_node(settings(folder, publisher.endpoint, **config)) as node:
            membership = await node.join(model.magnet, timeout=30)
            await membership.fetch(span)
            membership.peers.publish(resident=(span,))
            yield node, membership


def layer_size(membership: Membership) -> int:
    return sum(file.size for file in membership.manifest.block_files(5))


async def until_held(membership: Membership, blocks: set[int]) -> None:
    while not blocks <= set(membership.files.held()):
        await trio.sleep(0.05)


@in_trio(60)
async def test_what_is_adjacent_comes_and_is_offered_to_others(published: Any, tmp_path: Path) -> None:
    async with holding(published, tmp_path, Span(0, 1)) as (node, membership), trio.open_nursery() as nursery:
        nursery.start_soon(node.prefetcher.run)
        await until_held(membership, {2, 3, 4})
        assert {2, 3, 4} <= {block for span in membership.peers.record.held for block in span}
        assert membership.peers.record.resident == (Span(0, 1),)
        assert node.prefetcher.bytes > 0
        nursery.cancel_scope.cancel()


@in_trio(60)
async def test_a_route_displaces_what_is_only_adjacent_within_the_budget(published: Any, tmp_path: Path) -> None:
    async with holding(published, tmp_path, Span(0, 1), prefetch=1) as (node, membership):
        size = layer_size(membership)
    async with (
        holding(published, tmp_path, Span(0, 1), prefetch=size) as (node, membership),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(node.prefetcher.run)
        await until_held(membership, {2})
        assert set(membership.files.held()) == {0, 1, 2}
        node.prefetcher.saw(membership.id, Span(11, 11), trio.current_time())
        await until_held(membership, {11})
        assert set(membership.files.held()) == {0, 1, 11}
        assert node.prefetcher.bytes == size
        await trio.sleep(1)  # and there it stays
        assert set(membership.files.held()) == {0, 1, 11}
        nursery.cancel_scope.cancel()


@in_trio(60)
async def test_what_was_prefetched_is_known_after_a_restart_until_somebody_needs_it(
    published: Any, tmp_path: Path
) -> None:
    async with holding(published, tmp_path, Span(0, 1)) as (node, membership), trio.open_nursery() as nursery:
        nursery.start_soon(node.prefetcher.run)
        await until_held(membership, set(range(5)))
        nursery.cancel_scope.cancel()
    async with holding(published, tmp_path, Span(0, 1), prefetch=0) as (node, membership):
        before = node.prefetcher.bytes
        assert before >= 3 * layer_size(membership)
        await membership.fetch(Span(2, 2))
        assert node.prefetcher.bytes == before - layer_size(membership)


@in_trio(60)
async def test_off_fetches_nothing(published: Any, tmp_path: Path) -> None:
    async with holding(published, tmp_path, Span(0, 1), prefetch=0) as (node, membership):
        await node.prefetcher.run()
        assert set(membership.files.held()) == {0, 1}


@in_trio(60)
async def test_who_needs_what_is_being_prefetched_gets_it_at_full_speed(published: Any, tmp_path: Path) -> None:
    async with (
        holding(published, tmp_path, Span(0, 1), prefetch_rate=500) as (node, membership),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(node.prefetcher.run)
        [file] = membership.manifest.block_files(2)
        while file.name not in node.parts.shelf.transfers:
            await trio.sleep(0.05)
        transfer = node.parts.shelf.transfers[file.name]
        assert transfer.urgency is Urgency.BACKGROUND
        await membership.fetch(Span(2, 2))
        assert node.parts.shelf.transfers[file.name] is transfer
        assert set(membership.files.held()) == {0, 1, 2}  # at 500 bytes a second, the limit of this test comes first
        nursery.cancel_scope.cancel()


@in_trio(60)
async def test_what_nobody_sends_gives_way_to_the_next(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "STALL_S", 5.0)
    monkeypatch.setattr(prefetch, "MEASURE_EVERY_S", 0.2)
    async with holding(published, tmp_path, Span(0, 1)) as (node, membership), trio.open_nursery() as nursery:
        [file] = membership.manifest.block_files(2)
        fetch = membership.files.fetch

        async def never_the_first(files: Any, **more: Any) -> None:
            if file in files:
                await trio.sleep_forever()
            await fetch(files, **more)

        monkeypatch.setattr(membership.files, "fetch", never_the_first)
        nursery.start_soon(node.prefetcher.run)
        while len(membership.files.held()) == 2:
            await trio.sleep(0.05)
        assert 2 not in membership.files.held()
        nursery.cancel_scope.cancel()


@in_trio(60)
async def test_sessions_for_what_is_not_here_are_not_remembered(published: Any, tmp_path: Path) -> None:
    async with holding(published, tmp_path, Span(0, 1), prefetch=0) as (node, membership):
        node.prefetcher.saw(bytes(32), Span(0, 1), 0.0)
        node.prefetcher.saw(membership.id, Span(0, BLOCKS), 0.0)
        assert node.prefetcher._requests.expected() == {}
        node.prefetcher.saw(membership.id, Span(0, BLOCKS - 1), 0.0)
        assert node.prefetcher._requests.expected() == {(membership.id, Span(0, BLOCKS - 1)): pytest.approx(1.0)}
