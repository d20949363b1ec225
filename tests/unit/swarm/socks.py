"""A minimal SOCKS5 proxy (RFC 1928, RFC 1929) standing in for the gateway: CONNECT and UDP ASSOCIATE on loopback."""

from __future__ import annotations

import ipaddress
import socket
import struct

import trio

from torrentlm.swarm.settings import Proxy

USER, PASSWORD = "node", "secret"


class SocksStub:
    """``tcp``: endpoints dialled through it. ``udp_port``: where the outside sees the node's datagrams come from."""

    def __init__(self) -> None:
        self.tcp: list[tuple[str, int]] = []
        self.udp_port = 0
        self.proxy: Proxy

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.proxy = Proxy("127.0.0.1", listeners[0].socket.getsockname()[1], USER, PASSWORD)
        await trio.serve_listeners(self._serve, listeners, task_status=task_status)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._negotiate(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError, OSError):
            pass

    async def _negotiate(self, stream: trio.SocketStream) -> None:
        methods = (await _exactly(stream, 2))[1]
        assert 2 in await _exactly(stream, methods)
        await stream.send_all(b"\x05\x02")
        user = await _exactly(stream, (await _exactly(stream, 2))[1])
        password = await _exactly(stream, (await _exactly(stream, 1))[0])
        assert (user.decode(), password.decode()) == (USER, PASSWORD)
        await stream.send_all(b"\x01\x00")
        _, command, _, kind = await _exactly(stream, 4)
        assert kind == 1
        address = str(ipaddress.IPv4Address(await _exactly(stream, 4)))
        (port,) = struct.unpack("!H", await _exactly(stream, 2))
        if command == 3:
            await self._relay_udp(stream)
        else:
            await self._connect(stream, address, port)

    async def _connect(self, stream: trio.SocketStream, address: str, port: int) -> None:
        assert ipaddress.ip_address(address).is_loopback
        self.tcp.append((address, port))
        try:
            remote = await trio.open_tcp_stream(address, port)
        except OSError:
            await stream.send_all(b"\x05\x05\x00\x01" + bytes(6))
            return
        await stream.send_all(b"\x05\x00\x00\x01" + bytes(6))
        async with remote, trio.open_nursery() as nursery:
            nursery.start_soon(_copy, stream, remote, nursery.cancel_scope)
            nursery.start_soon(_copy, remote, stream, nursery.cancel_scope)

    async def _relay_udp(self, stream: trio.SocketStream) -> None:
        inner = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        outer = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with inner, outer:
            await inner.bind(("127.0.0.1", 0))
            await outer.bind(("127.0.0.1", 0))
            self.udp_port = outer.getsockname()[1]
            await stream.send_all(b"\x05\x00\x00\x01\x7f\x00\x00\x01" + struct.pack("!H", inner.getsockname()[1]))
            client: list[tuple[str, int]] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_outwards, inner, outer, client)
                nursery.start_soon(_inwards, outer, inner, client)
                await stream.receive_some(1)
                nursery.cancel_scope.cancel()


async def _outwards(
    inner: trio.socket.SocketType, outer: trio.socket.SocketType, client: list[tuple[str, int]]
) -> None:
    while True:
        data, source = await inner.recvfrom(65536)
        client[:] = [source]
        address, (port,) = str(ipaddress.IPv4Address(data[4:8])), struct.unpack("!H", data[8:10])
        assert ipaddress.ip_address(address).is_loopback
        await outer.sendto(data[10:], (address, port))


async def _inwards(outer: trio.socket.SocketType, inner: trio.socket.SocketType, client: list[tuple[str, int]]) -> None:
    while True:
        data, source = await outer.recvfrom(65536)
        header = b"\x00\x00\x00\x01" + ipaddress.IPv4Address(source[0]).packed + struct.pack("!H", source[1])
        if client:
            await inner.sendto(header + data, client[0])


async def _copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        async for data in source:
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = await stream.receive_some(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data
