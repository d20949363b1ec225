"""A BitTorrent client behind the gateway and peers before it, as scripts: real sockets, every byte in the test's
hand."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from torrentlm.bencode import encode
from torrentlm.gateway.gateway import Gateway
from torrentlm.gateway.policy import Policy
from torrentlm.gateway.socks import pack_endpoint
from torrentlm.records import Endpoint, InfoHash
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.settings import Proxy
from torrentlm.wire.peerwire import GREETING_BYTES, Greeting, extended_message

V1 = InfoHash(b"1" * 20)
V2 = InfoHash(b"2" * 20)
"""The two names of the one torrent that every fake client has."""

RESERVED = bytes((0, 0, 0, 0, 0, 0x10, 0, 0x11))
QUICK = Policy.from_environment({"TORRENTLM_LOOPBACK_ONLY": "1"})
QUICK = replace(QUICK, greeting_limit=0.5, join_limit=0.5, dial_limit=0.5, ping_every=0.1, grace=0.6)


class FakeTorrents:
    """Has one hybrid torrent; notes whom the gateway asks it to dial."""

    def __init__(self) -> None:
        self.asked_in, self.asked = trio.open_memory_channel[tuple[bytes, Endpoint]](100)
        self.first = False

    def had_first(self, info_hash: bytes) -> bool:
        return self.first

    def canonical(self, info_hash: bytes) -> InfoHash | None:
        return V1 if info_hash in (V1, V2) else None

    def connect_peer(self, info_hash: bytes, endpoint: Endpoint) -> None:
        self.asked_in.send_nowait((info_hash, endpoint))


class FakeNode:
    """A gateway with a fake client behind it."""

    def __init__(self, gateway: Gateway, identity: Identity, torrents: FakeTorrents) -> None:
        self.gateway = gateway
        self.identity = identity
        self.torrents = torrents

    @property
    def endpoint(self) -> Endpoint:
        return self.gateway.endpoint

    async def dial(self, target: Endpoint, info_hash: InfoHash = V1) -> Wire:
        """As the client: dial through the proxy and greet."""
        wire = Wire(await dial_proxy(self.gateway.proxy, target))
        await wire.greet(info_hash)
        return wire

    async def answer(self, info_hash: InfoHash = V1) -> Wire:
        """As the client: dial whom the gateway asks for, and greet."""
        _, endpoint = await self.torrents.asked.receive()
        return await self.dial(endpoint, info_hash)


class Wire:
    """One end of a BEP 3 connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    @property
    def port(self) -> int:
        port: int = self.stream.socket.getsockname()[1]
        return port

    async def greet(self, info_hash: InfoHash = V1, peer_id: bytes = b"-XX0000-" + b"x" * 12) -> None:
        await self.stream.send_all(Greeting(RESERVED, info_hash, peer_id).to_bytes())

    async def greeting(self) -> Greeting:
        return Greeting.parse(await self.exactly(GREETING_BYTES))

    async def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            more = await self.stream.receive_some(65536)
            if not more:
                raise EOFError
            self._buffer += more
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def message(self) -> bytes:
        """The next message with its length."""
        head = await self.exactly(4)
        return head + await self.exactly(int.from_bytes(head, "big"))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def offer(self, **fields: int) -> None:
        """An extended handshake as libtorrent sends it."""
        await self.send(extended_message(0, encode({"m": {"ut_metadata": 2, "ut_pex": 1}, "v": "fake", **fields})))

    async def ended(self) -> bool:
        """Whether the other end closes it now (whatever comes before is thrown away)."""
        try:
            with trio.fail_after(3):
                while await self.stream.receive_some(65536):
                    pass
        except trio.BrokenResourceError:
            return True
        except trio.TooSlowError:
            return False
        return True

    async def close(self) -> None:
        await self.stream.aclose()


async def dial_proxy(proxy: Proxy, target: Endpoint, password: str | None = None) -> trio.SocketStream:
    """SOCKS5 CONNECT as libtorrent does it; ConnectionRefusedError if the gateway refuses."""
    stream = await trio.open_tcp_stream(proxy.host, proxy.port)
    user, word = proxy.user.encode(), (proxy.password if password is None else password).encode()
    await stream.send_all(b"\x05\x02\x00\x02")
    assert await stream.receive_some(2) == b"\x05\x02"
    await stream.send_all(bytes([1, len(user)]) + user + bytes([len(word)]) + word)
    if await stream.receive_some(2) != b"\x01\x00":
        raise PermissionError
    await stream.send_all(b"\x05\x01\x00" + pack_endpoint(target))
    answer = await stream.receive_some(10)
    if answer[1]:
        raise ConnectionRefusedError(answer[1])
    return stream


async def dial_public(endpoint: Endpoint) -> Wire:
    """As a stranger on the network."""
    return Wire(await trio.open_tcp_stream(endpoint.host, endpoint.port))


@asynccontextmanager
async def fake_node(policy: Policy = QUICK) -> AsyncIterator[FakeNode]:
    identity, torrents = Identity.generate(), FakeTorrents()
    async with trio.open_nursery() as nursery:
        gateway = Gateway(identity, host="127.0.0.1", torrents=torrents, policy=policy)
        await nursery.start(gateway.run)
        yield FakeNode(gateway, identity, torrents)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two_nodes(policy: Policy = QUICK) -> AsyncIterator[tuple[FakeNode, FakeNode]]:
    """The first has the lower key: it leads."""
    async with fake_node(policy) as one, fake_node(policy) as other:
        yield (one, other) if one.identity.node < other.identity.node else (other, one)


async def joined(dialer: FakeNode, acceptor: FakeNode, by: InfoHash = V1, answer: InfoHash = V1) -> tuple[Wire, Wire]:
    """Both clients' ends of a connection, greetings exchanged."""
    near = await dialer.dial(acceptor.endpoint, by)
    far = await acceptor.answer(answer)
    await near.greeting()
    await far.greeting()
    return near, far


def piece(size: int = 16384) -> bytes:
    return (9 + size).to_bytes(4, "big") + b"\x07" + bytes(8) + os.urandom(size)
