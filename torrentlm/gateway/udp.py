"""The relay behind SOCKS5 UDP ASSOCIATE: libtorrent's DHT speaks to the world through the node's public UDP port."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio

from torrentlm.errors import NetworkError
from torrentlm.gateway.policy import Policy
from torrentlm.gateway.socks import Reply, Request, reply, unwrap_datagram, wrap_datagram
from torrentlm.gateway.tcp import TcpStream
from torrentlm.records import Endpoint
from torrentlm.swarm.addresses import is_address

_MAX_DATAGRAM = 65535
_PER_TURN = 64
_Address = tuple[str, int]


class DatagramRelay:
    """Owner of the public UDP socket.

    One association at a time: the client's newest, which it holds by a TCP connection.
    """

    def __init__(self, public: socket.socket, policy: Policy) -> None:
        self._public = public
        self._policy = policy
        self._inner: socket.socket | None = None
        self._client: _Address | None = None

    async def run(self) -> None:
        """Service: hand datagrams from the network to the client."""
        while True:
            await trio.lowlevel.wait_readable(self._public)
            _drain(self._public, self._from_network)

    async def associate(self, control: TcpStream, request: Request) -> None:
        """Serve one association until the client closes ``control``."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
            inner.setblocking(False)
            inner.bind(("127.0.0.1", 0))
            expected = (control.remote.host, request.target.port) if request.target.port else None
            self._inner, self._client = inner, expected
            await reply(control, Reply.SUCCEEDED, Endpoint(*inner.getsockname()))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve, inner, control.remote.host)
                    await _wait_closed(control)
                    nursery.cancel_scope.cancel()
            finally:
                trio.lowlevel.notify_closing(inner)
                if self._inner is inner:
                    self._inner = self._client = None

    async def _serve(self, inner: socket.socket, host: str) -> None:
        while True:
            await trio.lowlevel.wait_readable(inner)
            _drain(inner, lambda datagram, source: self._from_client(datagram, source, host))

    def _from_network(self, data: bytes, source: _Address) -> None:
        if self._inner is None or self._client is None or not self._policy.allows(source[0]):
            return
        _send(self._inner, wrap_datagram(Endpoint(*source[:2]), data), self._client)

    def _from_client(self, datagram: bytes, source: _Address, host: str) -> None:
        """Only the associated client may send; if it did not say from where, its first datagram does.

        Datagrams to names are dropped: only UDP trackers would be named so.
        """
        if self._client is None and source[0] == host:
            self._client = source
        if source != self._client:
            return
        try:
            target, data = unwrap_datagram(datagram)
        except ValueError:
            return
        if is_address(target.host) and self._policy.allows(target.host):
            _send(self._public, data, (target.host, target.port))


def _send(sock: socket.socket, data: bytes, target: _Address) -> None:
    """A datagram that cannot be sent now is lost, as datagrams are."""
    try:
        sock.sendto(data, target)
    except OSError:
        return


def _drain(sock: socket.socket, handle: Callable[[bytes, _Address], None]) -> None:
    """Take what has come, up to one turn's worth."""
    for _ in range(_PER_TURN):
        try:
            data, source = sock.recvfrom(_MAX_DATAGRAM)
        except BlockingIOError:
            return
        except OSError:
            continue  # an earlier datagram was refused by its target (ICMP)
        handle(data, source[:2])


async def _wait_closed(control: TcpStream) -> None:
    """Until the client closes the connection that holds its association; it has nothing to say there."""
    try:
        while await control.receive(64):
            pass
    except NetworkError:
        return
