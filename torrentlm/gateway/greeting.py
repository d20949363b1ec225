"""The first 68 bytes of a connection: who greets, from which listening port, and by which of a hybrid torrent's two
names.

Peer id (BEP 20 style) of a TorrentLM node::

    "-TLM001-"   a connection of its BitTorrent client      followed by  <u16 listening port>
    "-TLMP01-"   a connection for the pipe only                          <first 10 bytes of the node key>

The port lets the other end know a connecting peer by the address that it can be dialed at; the key settles
simultaneous dials. Both are claims until the pipe's handshake proves the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway.tcp import TcpStream
from torrentlm.records import NodeKey
from torrentlm.wire.peerwire import GREETING_BYTES, PROTOCOL, Greeting

_CLIENT_PREFIX = b"-TLM001-"
_PIPE_PREFIX = b"-TLMP01-"
_KEY_BYTES = 10

PIPE_RESERVED = bytes((0, 0, 0, 0, 0, 0x10, 0, 0))
"""Reserved bits of a pipe-only greeting: extended messages (BEP 10), nothing else."""


@dataclass(frozen=True, slots=True)
class PeerTag:
    """What a TorrentLM node's peer id says."""

    key: bytes
    port: int
    pipe_only: bool

    @classmethod
    def of(cls, node: NodeKey, port: int, *, pipe_only: bool) -> PeerTag:
        return cls(node[:_KEY_BYTES], port, pipe_only)

    @classmethod
    def parse(cls, peer_id: bytes) -> PeerTag | None:
        """None for any other client's peer id."""
        prefix = peer_id[:8]
        if prefix not in (_CLIENT_PREFIX, _PIPE_PREFIX):
            return None
        return cls(peer_id[10:], int.from_bytes(peer_id[8:10], "big"), prefix == _PIPE_PREFIX)

    def to_peer_id(self) -> bytes:
        return (_PIPE_PREFIX if self.pipe_only else _CLIENT_PREFIX) + self.port.to_bytes(2, "big") + self.key


async def read_greeting(stream: TcpStream, limit: float) -> Greeting:
    """The other end's greeting. RemoteProtocolError as soon as it turns out to be none, NetworkError after ``limit``
    seconds.

    Encrypted (MSE) greetings are refused with their first bytes: a client that may do without then dials again in
    plain.
    """
    data = b""
    with trio.move_on_after(limit):
        while len(data) < GREETING_BYTES:
            more = await stream.receive(GREETING_BYTES - len(data))
            if not more:
                raise NetworkError(f"{stream.remote} closed the connection before it had greeted")
            data += more
            if data[: len(PROTOCOL)] != PROTOCOL[: len(data)]:
                raise RemoteProtocolError(f"{stream.remote} does not speak plain BitTorrent")
        return Greeting.parse(data)
    raise NetworkError(f"{stream.remote} did not greet within {limit:g} s")
