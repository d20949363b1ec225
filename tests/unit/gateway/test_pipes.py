"""Pipes between two gateways: made, shared, moved, revived, closed. Their clients are scripts or absent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from tests.swarm.nodes import in_trio
from tests.unit.gateway.fakes import QUICK, V1, V2, FakeNode, Wire, dial_public, fake_node, piece, two_nodes
from tests.unit.gateway.test_connection import HELLO, piped
from torrentlm.errors import NetworkError
from torrentlm.gateway.pipe import Pipe
from torrentlm.records import Endpoint, InfoHash, NodeKey, SessionId
from torrentlm.wire.messages import Step, Tensor, Want


def step(size: int) -> Step:
    return Step(SessionId(bytes(16)), 0, 0, 0, Want.NONE, None, (Tensor("F32", (size // 4,), bytes(size)),), 1)


async def connected(one: FakeNode, other: FakeNode) -> tuple[Pipe, Pipe]:
    ours = await one.gateway.pipe_to(other.endpoint, V1)
    return ours, await other.gateway.incoming.receive()


def break_connections(node: FakeNode) -> None:
    for connection in node.gateway.connections:
        connection.close()


@in_trio(10)
async def test_a_pipe_without_any_transfer() -> None:
    async with two_nodes() as (one, other):
        ours, theirs = await connected(one, other)
        assert await one.gateway.incoming.receive() is ours
        assert (ours.peer, theirs.peer) == (other.identity.node, one.identity.node)
        assert (ours.endpoint, theirs.endpoint) == (other.endpoint, one.endpoint)
        await ours.send(HELLO, 3)
        assert await theirs.receive() == (3, HELLO)
        await theirs.send(step(1_000_000))
        _, message = await ours.receive()
        assert isinstance(message, Step) and len(message.tensors[0].data) == 1_000_000
        assert theirs.bytes_sent == ours.bytes_received > 1_000_000
        assert other.torrents.asked.statistics().current_buffer_used == 0  # its client was not bothered


@in_trio(10)
async def test_by_the_v2_hash_too() -> None:
    async with two_nodes() as (one, other):
        assert (await one.gateway.pipe_to(other.endpoint, V2)).peer == other.identity.node


@in_trio(10)
async def test_there_is_one_pipe_however_often_it_is_asked_for() -> None:
    async with two_nodes() as (one, other):
        pipes = []

        async def ask(near: FakeNode, far: FakeNode) -> None:
            pipes.append(await near.gateway.pipe_to(far.endpoint, V1))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask, one, other)
                nursery.start_soon(ask, other, one)
        assert len(set(pipes)) == 2
        while len(one.gateway.connections) + len(other.gateway.connections) > 2:
            await trio.sleep(0.01)
        assert await one.gateway.pipe_to(Endpoint("127.0.0.1", 1), V1, other.identity.node) in pipes


@in_trio(10)
async def test_the_round_trip_is_measured() -> None:
    async with two_nodes() as (one, other):
        ours, theirs = await connected(one, other)
        await trio.sleep(0.3)
        for pipe in (ours, theirs):
            assert pipe.rtt is not None and 0 < pipe.rtt < 0.2


@in_trio(10)
async def test_a_transfer_takes_the_pipe_over_and_gives_it_back() -> None:
    async with two_nodes() as (one, other):
        ours, theirs = await connected(one, other)
        near = await one.dial(other.endpoint)
        far = await other.answer()
        for wire in (near, far):
            await wire.greeting()
            await wire.offer()
        while len(one.gateway.connections) != 1 or not one.gateway.connections[0].attached:
            await trio.sleep(0.01)
        await ours.send(HELLO)
        assert await theirs.receive() == (0, HELLO)
        await near.close()
        assert await far.ended()
        await theirs.send(HELLO)
        assert await ours.receive() == (0, HELLO)
        assert not ours.closed.is_set() and len(one.gateway.connections) == 1


@pytest.mark.parametrize("breaker", [0, 1])
@in_trio(20)
async def test_nothing_is_lost_when_connections_break(breaker: int) -> None:
    async with two_nodes() as nodes, trio.open_nursery() as nursery:
        ours, theirs = await connected(*nodes)
        count = 300

        async def send() -> None:
            for number in range(count):
                await ours.send(step(number * 100))

        async def disturb() -> None:
            while True:
                await trio.sleep(0.05)
                break_connections(nodes[breaker])

        nursery.start_soon(send)
        nursery.start_soon(disturb)
        for number in range(count):
            _, message = await theirs.receive()
            assert isinstance(message, Step) and len(message.tensors[0].data) == number * 100
        nursery.cancel_scope.cancel()


@in_trio(10)
async def test_a_peer_that_is_gone_ends_the_pipe_with_one_sentence() -> None:
    async with fake_node() as one:
        async with fake_node() as other:
            ours, _ = await connected(one, other)
        with trio.fail_after(2):
            await ours.closed.wait()
        with pytest.raises(NetworkError, match=r"^the connection to peer 127\.0\.0\.1:\d+ ended: .*shutting down"):
            await ours.receive()
        with pytest.raises(NetworkError):
            await ours.send(HELLO)
        assert not one.gateway.pipes


@in_trio(10)
async def test_closing_tells_the_peer_and_a_new_pipe_can_follow() -> None:
    async with two_nodes() as (one, other):
        ours, theirs = await connected(one, other)
        await ours.send(HELLO)
        await ours.aclose()
        await theirs.closed.wait()
        assert (await theirs.receive())[1] == HELLO  # what came before is still there
        with pytest.raises(NetworkError):
            await theirs.receive()
        again, theirs_again = await connected(one, other)
        assert again is not ours
        await again.send(HELLO)
        assert (await theirs_again.receive())[1] == HELLO


@in_trio(10)
async def test_an_idle_pipe_is_closed_unless_pieces_travel_beside_it() -> None:
    policy = replace(QUICK, idle_limit=0.3)
    async with two_nodes(policy) as (one, other):
        ours, theirs = await connected(one, other)
        with trio.fail_after(3):
            await ours.closed.wait()
            await theirs.closed.wait()
        await one.gateway.incoming.receive()
        near, far = await piped(one, other)
        await trio.sleep(0.8)
        assert not one.gateway.pipes[other.identity.node].closed.is_set()
        await near.send(data := piece())
        assert await far.message() == data


class Frozen:
    """A forwarder before a node that can stop forwarding: as the peer sees it, the node is frozen."""

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.moving = trio.Event()
        self.moving.set()
        self.endpoint: Endpoint

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.endpoint = Endpoint("127.0.0.1", listener.socket.getsockname()[1])
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream(self.target.host, self.target.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, near, far)
            nursery.start_soon(self._copy, far, near)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            while data := await source.receive_some(65536):
                await self.moving.wait()
                await sink.send_all(data)
            await sink.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await source.aclose()


@asynccontextmanager
async def frozen_between(one: FakeNode, other: FakeNode) -> AsyncIterator[tuple[Frozen, Pipe]]:
    async with trio.open_nursery() as nursery:
        forwarder = Frozen(other.endpoint)
        await nursery.start(forwarder.run)
        yield forwarder, await one.gateway.pipe_to(forwarder.endpoint, V1)
        nursery.cancel_scope.cancel()


@in_trio(10)
async def test_a_frozen_peer_is_noticed_by_its_silence() -> None:
    policy = replace(QUICK, silence_limit=0.6)
    async with two_nodes(policy) as (one, other), frozen_between(one, other) as (forwarder, pipe):
        await trio.sleep(1)
        assert not pipe.closed.is_set()
        forwarder.moving = trio.Event()
        start = trio.current_time()
        with trio.fail_after(3):
            await pipe.closed.wait()
        assert 0.4 < trio.current_time() - start < 1.5
        with pytest.raises(NetworkError, match="nothing"):
            await pipe.send(HELLO)


@in_trio(10)
async def test_send_waits_while_the_peer_does_not_take() -> None:
    async with two_nodes() as (one, other):
        ours, theirs = await connected(one, other)
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await ours.send(step(100_000), 5)
                sent += 1
        assert 10 <= sent <= 30
        await ours.send(HELLO, 6)  # another stream is free
        received = [await theirs.receive() for _ in range(11)]
        assert (6, HELLO) in received
        with trio.fail_after(2):
            await ours.send(step(100_000), 5)


@in_trio(10)
async def test_another_node_than_expected() -> None:
    async with two_nodes() as (one, other):
        with pytest.raises(NetworkError, match="another node"):
            await one.gateway.pipe_to(other.endpoint, V1, NodeKey(b"k" * 32))


@in_trio(10)
async def test_dials_that_cannot_succeed() -> None:
    async with fake_node() as node, trio.open_nursery() as nursery:
        (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port: int = silent.socket.getsockname()[1]
        cases = [
            (node.endpoint, "this node itself"),
            (Endpoint("127.0.0.1", 1), "cannot be reached"),
            (Endpoint("127.0.0.1", port), "did not greet within"),
            (Endpoint("8.8.8.8", 80), "outside the networks"),
        ]
        for endpoint, reason in cases:
            with pytest.raises(NetworkError, match=reason), trio.fail_after(2):
                await node.gateway.pipe_to(endpoint, V1)
        assert node.gateway.is_own(node.endpoint)
        nursery.cancel_scope.cancel()


@in_trio(10)
async def test_a_torrent_that_the_peer_does_not_have() -> None:
    async with two_nodes() as (one, other):
        with pytest.raises(NetworkError):
            await one.gateway.pipe_to(other.endpoint, InfoHash(b"9" * 20))


@in_trio(10)
async def test_a_dial_that_nobody_waits_for_any_more_leaves_nothing_behind() -> None:
    async with two_nodes() as (one, other):
        with trio.move_on_after(0):
            await one.gateway.pipe_to(other.endpoint, V1)
        pipe = await one.gateway.pipe_to(other.endpoint, V1)
        assert pipe.peer == other.identity.node


@in_trio(10)
async def test_somebody_who_only_opens_a_connection_for_a_pipe_is_closed() -> None:
    policy = replace(QUICK, hello_limit=0.3)
    async with fake_node(policy) as node:
        stranger: Wire = await dial_public(node.endpoint)
        await stranger.greet(V1, b"-TLMP01-\x00\x01" + b"x" * 10)
        await stranger.greeting()
        assert await stranger.ended()
        assert not node.gateway.connections


def test_a_session_has_one_stream_and_it_is_not_the_control_stream() -> None:
    streams = {Pipe.stream_of(SessionId(number.to_bytes(16, "little"))) for number in range(1000)}
    assert 0 not in streams and len(streams) > 50
    assert Pipe.stream_of(SessionId(b"a" * 16)) == Pipe.stream_of(SessionId(b"a" * 16))
