"""TCP streams for the hot path: non-blocking sockets under trio's readiness calls, with ``_nowait`` twins.

trio's own streams make a scheduler pass per call; here a task reads and writes until the kernel says "not now".
OSError becomes
:exc:`NetworkError` in this module and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence

import trio

from torrentlm.errors import NetworkError
from torrentlm.records import Endpoint

Buffer = bytes | memoryview

_NOT_SENT_LOW_WATER = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
MAX_BUFFERS = 64
"""Most buffers that one ``send_nowait`` takes."""


class TcpStream:
    """One connected socket; ``remote`` is its other end, ``local`` ours. Owned by one task tree, which closes it."""

    __slots__ = ("_socket", "local", "remote")

    def __init__(self, sock: socket.socket, remote: Endpoint) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.remote = remote
        self.local = _endpoint(sock.getsockname())

    def receive_nowait(self, limit: int) -> bytes | None:
        """What has come, b"" at the end of the stream, None if nothing has come yet."""
        try:
            return self._socket.recv(limit)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    async def receive(self, limit: int) -> bytes:
        """At least one byte, or b"" at the end of the stream."""
        while (data := self.receive_nowait(limit)) is None:
            await self.readable()
        return data

    async def receive_exactly(self, count: int) -> bytes:
        """``count`` bytes; NetworkError if the stream ends before."""
        data = bytearray()
        while len(data) < count:
            more = await self.receive(count - len(data))
            if not more:
                raise NetworkError(f"{self.remote} closed the connection")
            data += more
        return bytes(data)

    def send_nowait(self, buffers: Sequence[Buffer]) -> int:
        """Write as much as the kernel takes now; return how many bytes that was."""
        try:
            if len(buffers) == 1:
                return self._socket.send(buffers[0])
            return self._socket.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._broken(error) from error

    async def send_all(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            sent = self.send_nowait([view])
            view = view[sent:]
            if view:
                await self.writable()

    async def readable(self) -> None:
        await trio.lowlevel.wait_readable(self._socket)

    async def writable(self) -> None:
        await trio.lowlevel.wait_writable(self._socket)

    def set_buffers(self, send: int, receive: int) -> None:
        """Kernel buffer sizes in bytes, fixed from now on."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)

    def set_unsent_limit(self, size: int) -> None:
        """How many bytes may wait in the kernel before it has sent them (TCP_NOTSENT_LOWAT)."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, _NOT_SENT_LOW_WATER, size)

    def finish(self) -> None:
        """Nothing more will be sent; the other direction stays open."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def detach(self) -> TcpStream:
        """The same connection for another owner; this object counts as closed from now on."""
        sock = socket.socket(fileno=self._socket.detach())
        return TcpStream(sock, self.remote)

    def close(self) -> None:
        """Idempotent. Whatever the kernel still holds is delivered."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def abort(self) -> None:
        """Close with a reset: the other end learns at once, nothing lingers."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _broken(self, error: OSError) -> NetworkError:
        return NetworkError(f"the connection to {self.remote} broke: {error.strerror or error}")


async def dial(endpoint: Endpoint, source: str | None = None) -> TcpStream:
    """Connect to an IP address; NetworkError if it cannot be. The time limit is the caller's."""
    sock = socket.socket(socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if source:
            sock.bind((source, 0))
        try:
            sock.connect((endpoint.host, endpoint.port))
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise NetworkError(f"{endpoint} cannot be reached: {os.strerror(code)}") from None
        return TcpStream(sock, endpoint)
    except OSError as error:
        sock.close()
        raise NetworkError(f"{endpoint} cannot be reached: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise


def listen(host: str, port: int, backlog: int = 256) -> socket.socket:
    """A listening socket; OSError if the port is taken."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


async def accept(listener: socket.socket) -> TcpStream:
    """The next connection. Ones that broke before they were accepted are passed over; out of descriptors, it waits."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, address = listener.accept()
            return TcpStream(sock, _endpoint(address))
        except BlockingIOError:
            continue
        except OSError:
            await trio.sleep(0.05)


def _endpoint(address: tuple[object, ...]) -> Endpoint:
    return Endpoint(str(address[0]).partition("%")[0].removeprefix("::ffff:"), int(str(address[1])))
