"""What a waiting session needs comes first: background transfers make way, between real sessions on a slow link."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.swarm.nodes import BareNode, in_trio, make_block, open_node
from torrentlm.swarm.transfer import Transfer, Urgency

SIZE = 6_000_000
LINK = 3_000_000
"""Bytes per second that the seed sends at most."""
UNDER_WAY = 1_500_000
"""What may still arrive of a background transfer when it is told to stop: sockets' and gateways' buffers."""


def seeded(seed: BareNode, folder: Path, count: int) -> list[bytes]:
    torrents = []
    for _ in range(count):
        torrent, _ = make_block(folder, SIZE)
        torrents.append(torrent.to_bytes())
        seed.swarm.add_torrent(torrents[-1], folder, verified=True)
    return torrents


async def until_bytes(transfer: Transfer, at_least: int, peer: BareNode) -> None:
    while received(transfer) < at_least:
        transfer.connect_peer(peer.endpoint)
        await trio.sleep(0.1)


def received(transfer: Transfer) -> int:
    return int(transfer.handle.status(0).total_payload_download)


@pytest.mark.parametrize("urgency", [Urgency.NOW, Urgency.NORMAL])
@in_trio(60)
async def test_background_makes_way_and_goes_on_afterwards(tmp_path: Path, urgency: Urgency) -> None:
    async with open_node(upload_limit=LINK) as seed, open_node() as node:
        first, second, urgent = seeded(seed, tmp_path / "a", 3)
        background = [
            node.swarm.add_torrent(torrent, tmp_path / "b", urgency=Urgency.BACKGROUND) for torrent in (first, second)
        ]
        for transfer in background:
            await until_bytes(transfer, 200_000, seed)
        needed = node.swarm.add_torrent(urgent, tmp_path / "b", urgency=urgency)
        if urgency is Urgency.NORMAL:  # it counts once something of it comes
            await until_bytes(needed, 1, seed)
            while not needed.progress.download_rate:
                await trio.sleep(0.05)
        before = sum(map(received, background))
        while not needed.complete:
            needed.connect_peer(seed.endpoint)
            for transfer in background:
                transfer.connect_peer(seed.endpoint)
            await trio.sleep(0.1)
        meanwhile = sum(map(received, background)) - before
        assert not any(transfer.complete for transfer in background)
        assert meanwhile <= UNDER_WAY < SIZE / 2  # a fair share of the link would be twice as much as needed got
        for transfer in background:
            while not transfer.complete:
                transfer.connect_peer(seed.endpoint)
                await trio.sleep(0.1)


@in_trio(60)
async def test_without_urgency_the_link_is_shared(tmp_path: Path) -> None:
    """What the test above would see if nothing made way."""
    async with open_node(upload_limit=LINK) as seed, open_node() as node:
        first, second, last = (
            node.swarm.add_torrent(torrent, tmp_path / "b") for torrent in seeded(seed, tmp_path / "a", 3)
        )
        for transfer in (first, second):
            await until_bytes(transfer, 200_000, seed)
        before = received(first) + received(second)
        while not last.complete:
            last.connect_peer(seed.endpoint)
            await trio.sleep(0.1)
        assert received(first) + received(second) - before > UNDER_WAY


@in_trio(60)
async def test_a_background_transfer_begins_stopped_while_something_is_needed_now(tmp_path: Path) -> None:
    async with open_node() as seed, open_node() as node:
        here, lonely = seeded(seed, tmp_path / "a", 2)
        needed = node.swarm.add_torrent(lonely, tmp_path / "b", urgency=Urgency.NOW)  # nobody is asked for it
        background = node.swarm.add_torrent(here, tmp_path / "b", urgency=Urgency.BACKGROUND)
        for _ in range(10):
            background.connect_peer(seed.endpoint)
            await trio.sleep(0.1)
        assert received(background) == 0
        node.swarm.remove(needed)
        await until_bytes(background, 1, seed)


@in_trio(60)
async def test_background_keeps_to_its_rate_until_somebody_waits_for_it(tmp_path: Path) -> None:
    async with open_node() as seed, open_node() as node, open_node() as other:
        torrents = seeded(seed, tmp_path / "a", 2)
        node.swarm.background_rate = 400_000
        transfers = [node.swarm.add_torrent(each, tmp_path / "b", urgency=Urgency.BACKGROUND) for each in torrents]
        for transfer in transfers:
            await until_bytes(transfer, 50_000, seed)
        unlimited = other.swarm.add_torrent(torrents[0], tmp_path / "c")  # has it all before these have a tenth
        while not unlimited.complete:
            unlimited.connect_peer(seed.endpoint)
            await trio.sleep(0.02)
        assert sum(map(received, transfers)) < SIZE
        assert sum(transfer.handle.download_limit() for transfer in transfers) == 400_000
        transfers[0].urge(Urgency.NOW)
        await transfers[0].wait_complete(20)
        assert not transfers[1].complete
        assert transfers[0].urgency is Urgency.NORMAL  # nobody waits for what is here


@in_trio(60)
async def test_what_already_runs_becomes_as_urgent_as_asked_for(tmp_path: Path) -> None:
    async with open_node() as node:
        torrent = make_block(tmp_path / "a")[0].to_bytes()
        transfer = node.swarm.add_torrent(torrent, tmp_path / "b", urgency=Urgency.BACKGROUND)
        assert node.swarm.add_torrent(torrent, tmp_path / "b", urgency=Urgency.NOW) is transfer
        assert transfer.urgency is Urgency.NOW
        node.swarm.add_torrent(torrent, tmp_path / "b")
        assert transfer.urgency is Urgency.NOW
