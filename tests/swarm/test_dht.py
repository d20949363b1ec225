"""The DHT through gateways' UDP relays: nodes that have nothing but loopback and each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest
import trio

from tests.swarm.nodes import BareNode, in_trio, make_block, open_node
from torrentlm import bencode
from torrentlm.errors import NetworkError
from torrentlm.records import Endpoint, InfoHash, NodeKey, PeerRecord, Span

MODEL = b"m" * 32


async def open_nodes(stack: AsyncExitStack, count: int) -> list[BareNode]:
    """Nodes of which each later one knows only the first, as a DHT bootstrap node."""
    nodes = [await stack.enter_async_context(open_node())]
    for _ in range(count - 1):
        nodes.append(await stack.enter_async_context(open_node(bootstrap=[nodes[0].endpoint])))
    return nodes


@in_trio(60)
async def test_announce_and_get_peers_under_both_hashes(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path)
    hashes = (InfoHash(torrent.v1), InfoHash(torrent.v2[:20]))
    async with AsyncExitStack() as stack:
        entrance, holder, seeker = await open_nodes(stack, 3)
        for info_hash in hashes:
            holder.swarm.dht.announce(info_hash, holder.endpoint.port)
        for info_hash in hashes:
            with trio.fail_after(10):
                while await seeker.swarm.dht.get_peers(info_hash) != (holder.endpoint,):
                    await trio.sleep(0.1)
        assert await seeker.swarm.dht.find_peers(hashes) == (holder.endpoint,)
        assert holder.endpoint in await entrance.swarm.dht.find_peers(hashes)


@in_trio(60)
async def test_nobody_announced(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        *_, seeker = await open_nodes(stack, 2)
        with trio.fail_after(5):
            assert await seeker.swarm.dht.get_peers(InfoHash(b"x" * 20)) == ()


@in_trio(30)
async def test_without_any_node_every_wait_ends() -> None:
    record = PeerRecord(NodeKey(b"n" * 32), MODEL, 7000)
    async with open_node() as alone:
        dht = alone.swarm.dht
        dht.announce(InfoHash(b"x" * 20), 7000)
        assert not await dht.wait_nodes(0.3)
        assert await dht.get_peers(InfoHash(b"x" * 20), 0.3) == ()
        assert await dht.get_record(NodeKey(b"n" * 32), MODEL, 0.3) is None
        with pytest.raises(NetworkError, match=r"no DHT node stored this node's record"):
            await dht.put_record(record, 0.3)


@in_trio(60)
async def test_announced_before_anybody_was_there() -> None:
    """The first node of a swarm announces into the void; the announce is made good when a node arrives."""
    info_hash = InfoHash(os.urandom(20))
    async with open_node() as first:
        first.swarm.dht.announce(info_hash, first.endpoint.port)
        await trio.sleep(0.5)
        async with open_node() as second:
            second.swarm.dht.add_node(first.endpoint)
            with trio.fail_after(20):
                while first.endpoint not in await second.swarm.dht.get_peers(info_hash):
                    await trio.sleep(0.2)


@in_trio(60)
async def test_records_are_put_updated_and_read() -> None:
    async with AsyncExitStack() as stack:
        _, holder, seeker = await open_nodes(stack, 3)
        node = holder.identity.node
        first = PeerRecord(node, MODEL, holder.endpoint.port, 1, (Span(0, 9),), device="cpu", memory_free=1 << 30)
        assert await seeker.swarm.dht.get_record(node, MODEL) is None
        assert await holder.swarm.dht.put_record(first) >= 1
        assert await seeker.swarm.dht.get_record(node, MODEL) == first
        second = PeerRecord(node, MODEL, holder.endpoint.port, 2, (Span(0, 30),), (Span(0, 9),))
        await holder.swarm.dht.put_record(second)
        assert await seeker.swarm.dht.get_record(node, MODEL) == second
        assert await seeker.swarm.dht.get_record(node, b"o" * 32) is None
        assert await seeker.swarm.dht.get_record(seeker.identity.node, MODEL) is None


@in_trio(60)
async def test_malformed_record_counts_as_none() -> None:
    async with AsyncExitStack() as stack:
        _, holder, seeker = await open_nodes(stack, 3)
        identity = holder.identity
        await holder.swarm.dht.wait_nodes(10)
        holder.swarm._session.dht_put_mutable_item(identity.expanded_key, identity.node, b"\xc1 nonsense", MODEL)
        await trio.sleep(1)
        assert await seeker.swarm.dht.get_record(identity.node, MODEL) is None


@pytest.mark.parametrize("way", ["magnet or static peer", "dht bootstrap"])
@in_trio(60)
async def test_any_one_way_in_is_enough(tmp_path: Path, way: str) -> None:
    torrent, content = make_block(tmp_path / "a")
    async with open_node() as entrance, open_node(bootstrap=[entrance.endpoint]) as holder:
        seeded = holder.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        for info_hash in seeded.info_hashes:
            holder.swarm.dht.announce(info_hash, holder.endpoint.port)
        bootstrap = [entrance.endpoint] if way == "dht bootstrap" else []
        async with open_node(bootstrap=bootstrap) as joiner:
            transfer = joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
            if bootstrap:
                while not (found := await joiner.swarm.dht.find_peers(transfer.info_hashes)):
                    await trio.sleep(0.1)
            else:
                found = (holder.endpoint,)
            for endpoint in found:
                transfer.connect_peer(endpoint)
            await transfer.wait_complete(20)
    assert (tmp_path / "b" / torrent.name).read_bytes() == content


@in_trio(60)
async def test_ordinary_dht_node_takes_part(plain_session: Callable[..., Any]) -> None:
    info_hash = InfoHash(os.urandom(20))
    operation = int(lt.alert_category.dht_operation)
    private = {"dht_restrict_routing_ips": False, "dht_restrict_search_ips": False, "dht_ignore_dark_internet": False}
    plain = plain_session(enable_dht=True, alert_mask=operation, **private)
    async with open_node(bootstrap=[Endpoint("127.0.0.1", plain.listen_port())]) as holder:
        holder.swarm.dht.announce(info_hash, holder.endpoint.port)
        found: list[tuple[str, int]] = []
        with trio.fail_after(20):
            while not found:
                plain.dht_get_peers(lt.sha1_hash(info_hash))
                await trio.sleep(0.3)
                for alert in plain.pop_alerts():
                    if isinstance(alert, lt.dht_get_peers_reply_alert):
                        found += alert.peers()
        assert set(found) == {("127.0.0.1", holder.endpoint.port)}


@in_trio(30)
async def test_libtorrents_own_sockets_are_deaf() -> None:
    """From outside: no TCP listener but the gateway's, and nothing answers on libtorrent's UDP socket."""
    before = own_sockets()
    async with open_node() as entrance, open_node(bootstrap=[entrance.endpoint]) as node:
        await node.swarm.dht.wait_nodes(10)
        ours = {entrance.endpoint.port, node.endpoint.port, entrance.gateway.proxy.port, node.gateway.proxy.port}
        opened = own_sockets() - before
        assert {port for kind, state, _, port in opened if kind == "tcp" and state == LISTENING} == ours
        wild = {port for kind, _, address, port in opened if kind == "udp" and address == "00000000"}
        assert len(wild) == 2  # libtorrent's, on 0.0.0.0 whatever it is told
        for port in wild:
            assert await dht_ping(port, 1.0) is None
        assert await dht_ping(node.endpoint.port, 5.0) is not None


LISTENING = "0A"


def own_sockets() -> set[tuple[str, str, str, int]]:
    """(kind, state, local address in hexadecimal, local port) of this process's IPv4 sockets, by the kernel."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    found = set()
    for kind in ("tcp", "udp"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[9] in inodes:
                found.add((kind, fields[3], address, int(port, 16)))
    return found


async def dht_ping(port: int, seconds: float) -> bytes | None:
    """The answer to a BEP 5 ping, None if there is none."""
    query = bencode.encode({"t": b"aa", "y": "q", "q": "ping", "a": {"id": os.urandom(20)}})
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        await asking.bind(("127.0.0.1", 0))
        with trio.move_on_after(seconds):
            while True:
                await asking.sendto(query, ("127.0.0.1", port))
                with trio.move_on_after(0.5):
                    data, _ = await asking.recvfrom(2048)
                    if b"1:y1:r" in data:
                        return data
    return None
