"""The UDP relay: what leaves by the public port, and for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.swarm.nodes import in_trio
from tests.unit.gateway.fakes import FakeNode, fake_node
from torrentlm.gateway.socks import pack_endpoint, unwrap_datagram, wrap_datagram
from torrentlm.records import Endpoint


class Associated:
    """A DHT behind the relay, as a script."""

    def __init__(self, control: trio.SocketStream, sock: trio.socket.SocketType, relay: Endpoint) -> None:
        self.control = control
        self.socket = sock
        self.relay = (relay.host, relay.port)

    async def send(self, target: Endpoint, data: bytes) -> None:
        await self.socket.sendto(wrap_datagram(target, data), self.relay)

    async def receive(self) -> tuple[Endpoint, bytes]:
        datagram, source = await self.socket.recvfrom(2048)
        assert source == self.relay
        return unwrap_datagram(datagram)


async def udp_socket() -> trio.socket.SocketType:
    sock = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))
    return sock


def address(sock: trio.socket.SocketType) -> Endpoint:
    host, port = sock.getsockname()
    return Endpoint(host, port)


@asynccontextmanager
async def associated(node: FakeNode, say_port: bool = True) -> AsyncIterator[Associated]:
    proxy = node.gateway.proxy
    control = await trio.open_tcp_stream(proxy.host, proxy.port)
    user, word = proxy.user.encode(), proxy.password.encode()
    await control.send_all(b"\x05\x01\x02" + bytes([1, len(user)]) + user + bytes([len(word)]) + word)
    await control.receive_some(4)
    with await udp_socket() as sock:
        said = Endpoint("0.0.0.0", address(sock).port if say_port else 0)
        await control.send_all(b"\x05\x03\x00" + pack_endpoint(said))
        answer = b""
        while len(answer) < 10:
            answer += await control.receive_some(12 - len(answer))
        answer = answer[-10:]
        assert answer[1] == 0
        relay = Endpoint("127.0.0.1", int.from_bytes(answer[8:10], "big"))
        async with control:
            yield Associated(control, sock, relay)


@in_trio(10)
async def test_both_ways_through_the_public_port() -> None:
    for say_port in (True, False):
        async with fake_node() as node, associated(node, say_port) as dht:
            with await udp_socket() as far:
                await dht.send(address(far), b"ping")
                data, source = await far.recvfrom(2048)
                assert (data, source) == (b"ping", ("127.0.0.1", node.endpoint.port))
                await far.sendto(b"pong", source)
                assert await dht.receive() == (address(far), b"pong")


@in_trio(10)
async def test_nobody_else_may_use_the_relay() -> None:
    async with fake_node() as node, associated(node) as dht:
        with await udp_socket() as far, await udp_socket() as thief:
            await thief.sendto(wrap_datagram(address(far), b"stolen"), dht.relay)
            await dht.send(address(far), b"mine")
            assert (await far.recvfrom(2048))[0] == b"mine"
            await far.sendto(b"answer", ("127.0.0.1", node.endpoint.port))
            assert (await dht.receive())[1] == b"answer"
            with trio.move_on_after(0.1):
                await thief.recvfrom(2048)
                raise AssertionError("the thief got something")


@in_trio(10)
async def test_nothing_leaves_loopback_and_nonsense_does_no_harm() -> None:
    async with fake_node() as node, associated(node) as dht:
        with await udp_socket() as far:
            await dht.send(Endpoint("8.8.8.8", 53), b"leak")
            await dht.socket.sendto(b"nonsense", dht.relay)
            await dht.socket.sendto(b"\0\0\0\x03\x09localhost\0\x35name", dht.relay)
            await dht.send(address(far), b"still there")
            assert (await far.recvfrom(2048))[0] == b"still there"


@in_trio(10)
async def test_without_an_association_datagrams_are_dropped_and_a_new_one_takes_over() -> None:
    async with fake_node() as node:
        with await udp_socket() as far:
            await far.sendto(b"early", ("127.0.0.1", node.endpoint.port))
            async with associated(node):
                pass
            await trio.sleep(0.05)
            await far.sendto(b"between", ("127.0.0.1", node.endpoint.port))
            await trio.sleep(0.05)
            async with associated(node) as dht:
                await far.sendto(b"now", ("127.0.0.1", node.endpoint.port))
                assert (await dht.receive())[1] == b"now"
