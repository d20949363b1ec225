"""One connection between two gateways: what passes, what is added, and who may leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from tests.swarm.nodes import in_trio
from tests.unit.gateway.fakes import QUICK, V1, FakeNode, Wire, dial_public, fake_node, joined, piece, two_nodes
from torrentlm.bencode import decode
from torrentlm.gateway.turns import EVERY_S
from torrentlm.records import SessionId
from torrentlm.wire.extension import PIPE_NAME
from torrentlm.wire.messages import Close
from torrentlm.wire.peerwire import (
    CHOKE,
    INTERESTED,
    KEEP_ALIVE,
    NOT_INTERESTED,
    UNCHOKE,
    extended_message,
    port_message,
    signal_message,
)

HELLO = Close(SessionId(b"s" * 16))


async def piped(one: FakeNode, other: FakeNode) -> tuple[Wire, Wire]:
    """A joined connection on which both clients have offered extensions, and its pipe stands."""
    near, far = await joined(one, other)
    await near.offer()
    await far.offer()
    await near.message()
    await far.message()
    await one.gateway.incoming.receive()
    await other.gateway.incoming.receive()
    return near, far


@in_trio(10)
async def test_messages_pass_unchanged_both_ways() -> None:
    async with two_nodes() as (one, other):
        near, far = await joined(one, other)
        for sender, receiver in ((near, far), (far, near)):
            stream = b"\0\0\0\1\2" + KEEP_ALIVE + piece() * 20 + extended_message(3, b"x") + piece(100)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send, stream)
                assert await receiver.exactly(len(stream)) == stream


@in_trio(10)
async def test_the_offer_has_the_pipe_and_our_port_and_the_clients_do_not_see_it() -> None:
    async with fake_node() as node:
        stranger = await dial_public(node.endpoint)
        await stranger.greet()
        client = await node.answer()
        await stranger.greeting()
        await client.offer(p=1)
        message = await stranger.message()
        fields = decode(message[6:], max_size=10_000)
        assert fields == {b"m": {b"ut_metadata": 2, PIPE_NAME: 77}, b"p": node.endpoint.port, b"v": b"fake"}
        await stranger.send(extended_message(0, b"d1:md14:torrentlm_pipei9e6:ut_pexi1e11:ut_metadatai3eee"))
        await client.greeting()
        assert (await client.message())[6:] == b"d1:md11:ut_metadatai3eee"


@in_trio(10)
async def test_port_messages_say_our_udp_port() -> None:
    async with two_nodes() as (one, other):
        near, far = await joined(one, other)
        await near.send(port_message(1) + piece(10))
        assert await far.message() == port_message(one.endpoint.port)


@in_trio(10)
async def test_a_stranger_without_the_pipe_is_passed_through_and_nothing_is_put_in_between() -> None:
    async with fake_node() as node:
        stranger = await dial_public(node.endpoint)
        await stranger.greet()
        client = await node.answer()
        await stranger.greeting(), await client.greeting()
        await client.offer()
        await stranger.message()
        await stranger.offer()
        await client.message()
        data = piece() * 3
        await client.send(data)
        assert await stranger.exactly(len(data)) == data
        assert not node.gateway.pipes
        await stranger.close()
        assert await client.ended()


@in_trio(10)
async def test_frames_travel_between_the_messages() -> None:
    async with two_nodes() as (one, other):
        near, far = await piped(one, other)
        ours, theirs = one.gateway.pipes[other.identity.node], other.gateway.pipes[one.identity.node]
        data = piece()
        for _ in range(10):
            await near.send(data[:5000])
            await ours.send(HELLO)
            assert await theirs.receive() == (0, HELLO)  # it does not wait for the rest of the piece
            await near.send(data[5000:])
            assert await far.message() == data
        assert len(one.gateway.connections) == len(other.gateway.connections) == 1


@pytest.mark.parametrize("leaver", [0, 1])
@in_trio(10)
async def test_the_pipe_outlives_the_client_that_leaves(leaver: int) -> None:
    async with two_nodes() as nodes:
        wires = await piped(*nodes)
        await wires[leaver].send(piece()[:7000])  # unfinished: nobody must wait for the rest
        await wires[leaver].close()
        assert await wires[1 - leaver].ended()  # the other client is free to go elsewhere
        one, other = nodes
        await one.gateway.pipes[other.identity.node].send(HELLO)
        assert (await other.gateway.pipes[one.identity.node].receive())[1] == HELLO
        assert [connection.attached for node in nodes for connection in node.gateway.connections] == [False, False]


@in_trio(10)
async def test_what_was_sent_before_leaving_arrives() -> None:
    async with two_nodes() as (one, other):
        near, far = await piped(one, other)
        data = piece() * 50
        async with trio.open_nursery() as nursery:

            async def send_and_leave() -> None:
                await near.send(data)
                await near.close()

            nursery.start_soon(send_and_leave)
            assert await far.exactly(len(data)) == data
        assert await far.ended()


@in_trio(10)
async def test_a_client_that_leaves_inside_a_long_message_ends_the_connection() -> None:
    async with two_nodes() as (one, other):
        near, far = await piped(one, other)
        await near.send(piece(200_000)[:150_000])
        await far.exactly(100_000)
        await near.close()
        assert await far.ended()
        pipe = one.gateway.pipes[other.identity.node]
        await pipe.send(HELLO)  # over a new connection
        assert (await other.gateway.pipes[one.identity.node].receive())[1] == HELLO


@in_trio(10)
async def test_simultaneous_dials_end_in_one_connection() -> None:
    for _ in range(5):
        async with two_nodes() as (one, other), trio.open_nursery() as nursery:
            wires = []

            async def meet(node: FakeNode, peer: FakeNode, wires: list[Wire]) -> None:
                wire = await node.dial(peer.endpoint)
                await wire.greeting()
                wires.append(wire)

            async def nobody_else(node: FakeNode) -> None:
                await node.torrents.asked.receive()
                raise AssertionError("the client was asked to dial a peer that it was dialing")

            nursery.start_soon(meet, one, other, wires)
            nursery.start_soon(meet, other, one, wires)
            for node in (one, other):
                nursery.start_soon(nobody_else, node)
            while len(wires) < 2:
                await trio.sleep(0.01)
            await wires[0].send(data := piece())
            assert await wires[1].message() == data
            assert len(one.gateway.connections) == len(other.gateway.connections) == 1
            nursery.cancel_scope.cancel()


@in_trio(10)
async def test_a_second_connection_for_the_same_torrent_is_refused() -> None:
    async with two_nodes() as (one, other):
        near, far = await joined(one, other)
        again = await one.dial(other.endpoint)
        assert (await again.greeting()).info_hash == bytes(20)
        await near.send(data := piece())
        assert await far.message() == data


@in_trio(10)
async def test_dialing_ourselves_ends_and_is_remembered() -> None:
    async with fake_node() as node:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def forward(stream: trio.SocketStream) -> None:
            """Another address of this very node."""
            inner = await trio.open_tcp_stream(node.endpoint.host, node.endpoint.port)
            await inner.send_all(await stream.receive_some(100))
            await stream.send_all(await inner.receive_some(100) or b"")
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, forward, [listener])
            port: int = listener.socket.getsockname()[1]
            client = await node.dial(replace(node.endpoint, port=port), V1)
            assert (await client.greeting()).info_hash == bytes(20)
            nursery.cancel_scope.cancel()


@in_trio(20)
async def test_the_queue_to_a_client_that_does_not_read_is_bounded() -> None:
    policy = replace(QUICK, queue_to_client=1 << 20)
    async with two_nodes(policy) as (one, other):
        near, far = await joined(one, other)
        sent = 0
        with trio.move_on_after(1.5):
            while sent < 100 << 20:
                await near.send(piece() * 8)
                sent += 8 * 16397
        assert 1 << 20 < sent < 40 << 20
        assert len(await far.exactly(1 << 20)) == 1 << 20


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\xff\xff\xff\xff\x07" + bytes(10), id="a message without end"),
        pytest.param(extended_message(77, b"early"), id="a frame before the offer"),
        pytest.param(extended_message(0, b"junk"), id="an offer that is none"),
        pytest.param(
            extended_message(0, b"d1:md14:torrentlm_pipei9eee") + extended_message(77, b"\x04junk"), id="a bad frame"
        ),
    ],
)
@in_trio(10)
async def test_a_peer_that_breaks_a_rule_is_closed(said: bytes) -> None:
    async with fake_node() as node:
        stranger = await dial_public(node.endpoint)
        await stranger.greet()
        client = await node.answer()
        await stranger.greeting()
        await client.offer()
        await stranger.send(said)
        assert await stranger.ended()
        assert not node.gateway.connections


async def stranger_at(node: FakeNode) -> tuple[Wire, Wire]:
    """(its end, the client's) of a connection that is joined and knows no pipe."""
    stranger = await dial_public(node.endpoint)
    await stranger.greet()
    client = await node.answer()
    await stranger.greeting(), await client.greeting()
    return stranger, client


@in_trio(20)
async def test_where_the_client_had_a_torrent_first_peers_are_unchoked_by_turns() -> None:
    async with fake_node() as node:
        node.torrents.first = True
        near, first = await stranger_at(node)
        far, second = await stranger_at(node)
        for stranger, client in ((near, first), (far, second)):
            await client.send(signal_message(UNCHOKE))
            await stranger.send(signal_message(INTERESTED))
            assert await client.message() == signal_message(INTERESTED)
        assert await near.message() == signal_message(UNCHOKE)
        data = piece()
        await second.send(data[:9000])  # a message under way is not broken by what the gateway says itself
        await near.send(signal_message(NOT_INTERESTED))
        assert await near.message() == signal_message(CHOKE)
        await trio.sleep(2 * EVERY_S)
        await second.send(data[9000:])
        assert await far.message() == data
        assert await far.message() == signal_message(UNCHOKE)


@in_trio(20)
async def test_everywhere_else_the_client_alone_says_who_is_choked() -> None:
    async with fake_node() as node:
        for stranger, client in [await stranger_at(node) for _ in range(2)]:
            await stranger.send(signal_message(INTERESTED))
            for code in (UNCHOKE, CHOKE, UNCHOKE):
                await client.send(signal_message(code))
                assert await stranger.message() == signal_message(code)
