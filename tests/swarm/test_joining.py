"""Several empty nodes that fetch the same at once trade what they have, and say so while they do."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.e2e import checkpoint
from tests.swarm.nodes import BareNode, in_trio, make_block, open_node
from tests.swarm.shelves import open_keeper
from torrentlm.config import NodeConfig, Recipe
from torrentlm.node import node as whole
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.swarm.transfer import Transfer

JOINERS = 8
SIZE = 3_000_000
LINK = 1_500_000
"""Bytes per second that the publisher sends at most: what the joiners send each other has no limit."""
COPIES = 1.5
"""A server would send ``JOINERS`` copies, and a source that gives to everybody at once 1.7 to 1.8."""


def sent(transfer: Transfer) -> int:
    return int(transfer.handle.status(0).total_payload_upload)


async def meet(transfers: list[Transfer], nodes: list[BareNode], done: trio.Event) -> None:
    while not done.is_set():
        for transfer in transfers:
            for node in nodes:
                transfer.connect_peer(node.endpoint)
        await trio.sleep(0.5)


@in_trio(90)
async def test_the_publisher_sends_far_fewer_copies_than_there_are_joiners(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "publisher", SIZE)
    async with open_node(upload_limit=LINK) as publisher, trio.open_nursery() as nursery:
        seeding = publisher.swarm.add_torrent(torrent.to_bytes(), tmp_path / "publisher", verified=True)
        nodes: list[BareNode] = []
        ready, over, done = trio.Event(), trio.Event(), trio.Event()

        async def joiner() -> None:
            async with open_node() as node:
                nodes.append(node)
                if len(nodes) == JOINERS:
                    ready.set()
                await over.wait()

        for _ in range(JOINERS):
            nursery.start_soon(joiner)
        await ready.wait()
        transfers = [
            node.swarm.add_torrent(torrent.to_bytes(), tmp_path / str(number)) for number, node in enumerate(nodes)
        ]
        nursery.start_soon(meet, transfers, [publisher, *nodes], done)
        for transfer in transfers:
            await transfer.wait_complete(30)
        copies = sent(seeding) / SIZE
        done.set()
        over.set()
    assert 1 <= copies <= COPIES
    for number in range(JOINERS):
        assert (tmp_path / str(number) / torrent.name).read_bytes() == content


@in_trio(60)
async def test_the_record_says_what_is_being_fetched(tmp_path: Path) -> None:
    """Others that fetch the same connect to who says so, and need not wait until it is complete."""
    torrents = [make_block(tmp_path / "a", 300_000)[0] for _ in range(3)]
    async with open_node() as seed, open_keeper(tmp_path / "b") as keeper:
        for torrent in torrents:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        files = keeper.model(torrents, [seed.endpoint])
        said: list[tuple[Span, ...]] = files._peers.fetching  # type: ignore[attr-defined]
        said.clear()
        await files.fetch(files._manifest.files[1:])
        assert said[0] == (Span(1, 2),)
        assert said[-1] == ()
        assert all(1 <= len(span) <= 2 for spans in said[:-1] for span in spans)
        assert files.held() == [1, 2]


@in_trio(120)
async def test_a_mirror_gets_every_file_and_computes_nothing(tmp_path: Path) -> None:
    base = checkpoint.make(tmp_path / "base", 3)
    with Store(tmp_path / "publisher") as store:
        model = publish(Recipe("base", base), store)

    def config(name: str, **more: object) -> NodeConfig:
        return NodeConfig(tmp_path / name, "127.0.0.1", 0, blocks="none", **more)  # type: ignore[arg-type]

    upload, download = 3_000_000, 5_000_000
    async with whole.open_node(config("publisher", dht_bootstrap=())) as publisher:
        await publisher.join(model.magnet, timeout=30)
        settings = config(
            "mirror", dht_bootstrap=(), peers=(publisher.endpoint,), mirror=True, upload=upload, download=download
        )
        async with whole.open_node(settings) as mirror:
            membership = await mirror.join(model.magnet, timeout=30)
            assert membership.files.held() == []
            await mirror.hold(membership)
            assert membership.files.held() == list(range(len(model.manifest.blocks)))
            assert membership.peers.record.resident == ()
            session = mirror.parts.swarm._session
            limits = session.get_settings()
            assert (limits["upload_rate_limit"], limits["download_rate_limit"]) == (upload, download)
            near = session.get_peer_class(session.local_peer_class_id)
            assert (near["upload_limit"], near["download_limit"]) == (upload, download)
    for file in model.manifest.files:
        here, there = (tmp_path / name / "blocks" / file.name for name in ("mirror", "publisher"))
        assert here.read_bytes() == there.read_bytes()
