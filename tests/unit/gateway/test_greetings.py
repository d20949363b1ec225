"""Greetings by both names of a torrent, and greetings that are none."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

import pytest
import trio

from tests.swarm.nodes import in_trio
from tests.unit.gateway.fakes import QUICK, V1, V2, Wire, dial_public, fake_node, joined, piece, two_nodes
from torrentlm.gateway.greeting import PeerTag
from torrentlm.records import Endpoint, InfoHash
from torrentlm.wire.peerwire import PROTOCOL, Greeting

NAMES = [(V1, V1), (V1, V2), (V2, V1), (V2, V2)]


@pytest.mark.parametrize(("asked", "ours"), NAMES)
@in_trio(10)
async def test_incoming_each_end_hears_the_name_that_it_said(asked: InfoHash, ours: InfoHash) -> None:
    async with fake_node() as node:
        stranger = await dial_public(node.endpoint)
        await stranger.greet(asked)
        assert await node.torrents.asked.receive() == (asked, Endpoint("127.0.0.1", stranger.port))
        client = await node.dial(Endpoint("127.0.0.1", stranger.port), ours)
        assert (await client.greeting()).info_hash == ours
        assert (await stranger.greeting()).info_hash == asked


@pytest.mark.parametrize(("ours", "answer"), NAMES)
@in_trio(10)
async def test_outgoing_each_end_hears_the_name_that_it_said(ours: InfoHash, answer: InfoHash) -> None:
    async with fake_node() as node, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        peer = Endpoint("127.0.0.1", listener.socket.getsockname()[1])

        async def dial() -> None:
            client = await node.dial(peer, ours)
            assert (await client.greeting()).info_hash == ours
            await client.send(b"\0\0\0\1\2")
            assert await stranger.message() == b"\0\0\0\1\2"

        nursery.start_soon(dial)
        stranger = Wire(await listener.accept())
        assert (await stranger.greeting()).info_hash == ours
        await stranger.greet(answer)


@in_trio(10)
async def test_the_peer_sees_who_we_are_and_where_we_listen() -> None:
    async with two_nodes() as (one, other):
        near = await one.dial(other.endpoint)
        assert await other.torrents.asked.receive() == (V1, one.endpoint)
        far = await other.dial(one.endpoint)
        for end, node in ((far, one), (near, other)):
            tag = PeerTag.parse((await end.greeting()).peer_id)
            assert tag == PeerTag.of(node.identity.node, node.endpoint.port, pipe_only=False)


@in_trio(10)
async def test_an_answer_for_another_torrent_is_passed_on_for_the_client_to_refuse() -> None:
    async with fake_node() as node:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        client = await node.dial(Endpoint("127.0.0.1", listener.socket.getsockname()[1]))
        await Wire(await listener.accept()).greet(InfoHash(b"9" * 20))
        assert (await client.greeting()).info_hash == b"9" * 20


@in_trio(10)
async def test_a_dead_port_is_a_failed_attempt_for_the_client() -> None:
    async with fake_node() as node:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        dead = Endpoint("127.0.0.1", listener.socket.getsockname()[1])
        await listener.aclose()
        client = await node.dial(dead)
        assert (await client.greeting()).info_hash == bytes(20)
        assert await client.ended()


MSE = os.urandom(96 + 100)  # Diffie-Hellman public key and padding: bytes that look like chance


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(MSE, id="MSE"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="garbage"),
        pytest.param(b"", id="silent"),
        pytest.param(PROTOCOL + bytes(20), id="half-open"),
        pytest.param(Greeting(bytes(8), InfoHash(b"9" * 20), bytes(20)).to_bytes(), id="unknown torrent"),
        pytest.param(Greeting(bytes(8), V1, bytes(20)).to_bytes(), id="the client never comes"),
    ],
)
@in_trio(10)
async def test_hostile_greetings_end_in_time_and_cost_nobody_else_anything(said: bytes) -> None:
    async with two_nodes() as (one, other):
        near, far = await joined(one, other)
        start = trio.current_time()
        hostile = [await dial_public(other.endpoint) for _ in range(5)]
        for wire in hostile:
            await wire.send(said)
        for _ in range(20):
            await near.send(data := piece())
            assert await far.message() == data
        for wire in hostile:
            assert await wire.ended()
        limit = 0.2 if said in (MSE, b"GET / HTTP/1.1\r\n\r\n") else 2 * QUICK.greeting_limit + 0.5
        assert trio.current_time() - start < limit + 0.5
        await near.send(data := piece())
        assert await far.message() == data


@in_trio(20)
async def test_pending_greetings_are_bounded_and_newcomers_are_served() -> None:
    policy = replace(QUICK, pending_greetings=8, greeting_limit=5.0)
    async with two_nodes(policy) as (one, other):
        silent = [await dial_public(other.endpoint) for _ in range(30)]
        near, far = await joined(one, other)
        await near.send(data := piece())
        assert await far.message() == data
        assert await silent[0].ended()


@in_trio(20)
async def test_connections_are_bounded() -> None:
    policy = replace(QUICK, connections_per_host=1)
    async with two_nodes(policy) as (one, other):
        near, far = await joined(one, other)
        with suppress(OSError):  # closed before we knew that it was open
            assert await (await dial_public(other.endpoint)).ended()
        await near.send(data := piece())
        assert await far.message() == data
        assert len(other.gateway.connections) == 1
