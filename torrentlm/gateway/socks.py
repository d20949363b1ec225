"""The proxy that libtorrent talks to: SOCKS5 (RFC 1928) with a password (RFC 1929), on loopback only.

Only the negotiation is here; what happens behind a request is the gateway's.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from enum import IntEnum

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway.tcp import TcpStream
from torrentlm.records import Endpoint
from torrentlm.swarm.settings import Proxy

_VERSION = 5
_PASSWORD_METHOD = 2
_NO_METHOD = 255
_IPV4, _NAME, _IPV6 = 1, 3, 4
_ADDRESS_BYTES = {_IPV4: 4, _IPV6: 16}


class Command(IntEnum):
    CONNECT = 1
    UDP_ASSOCIATE = 3


class Reply(IntEnum):
    SUCCEEDED = 0
    FAILURE = 1
    NOT_ALLOWED = 2
    REFUSED = 5
    COMMAND_NOT_SUPPORTED = 7


@dataclass(frozen=True, slots=True)
class Request:
    """``target`` may hold a name instead of an address; port 0 in a UDP ASSOCIATE means "not known yet"."""

    command: int
    target: Endpoint


def make_proxy(port: int) -> Proxy:
    """Credentials for this process: without them every local user would have an open proxy."""
    return Proxy("127.0.0.1", port, secrets.token_hex(8), secrets.token_hex(16))


async def negotiate(stream: TcpStream, proxy: Proxy) -> Request:
    """Authenticate the client and read its request.

    RemoteProtocolError if it is not ours; the time limit is the caller's.
    """
    version, count = await stream.receive_exactly(2)
    methods = await stream.receive_exactly(count)
    if version != _VERSION or _PASSWORD_METHOD not in methods:
        await stream.send_all(bytes((_VERSION, _NO_METHOD)))
        raise RemoteProtocolError("a proxy client offered no password")
    await stream.send_all(bytes((_VERSION, _PASSWORD_METHOD)))
    user, password = await _credentials(stream)
    right = hmac.compare_digest(user, proxy.user.encode()) & hmac.compare_digest(password, proxy.password.encode())
    await stream.send_all(bytes((1, 0 if right else 1)))
    if not right:
        raise RemoteProtocolError("a proxy client gave a wrong password")
    version, command, _, kind = await stream.receive_exactly(4)
    if version != _VERSION:
        raise RemoteProtocolError("a proxy client changed its version")
    return Request(command, await _target(stream, kind))


async def _credentials(stream: TcpStream) -> tuple[bytes, bytes]:
    _, length = await stream.receive_exactly(2)
    user = await stream.receive_exactly(length)
    (length,) = await stream.receive_exactly(1)
    return user, await stream.receive_exactly(length)


async def _target(stream: TcpStream, kind: int) -> Endpoint:
    if kind == _NAME:
        (length,) = await stream.receive_exactly(1)
        host = _name(await stream.receive_exactly(length))
    elif kind in _ADDRESS_BYTES:
        host = str(ipaddress.ip_address(await stream.receive_exactly(_ADDRESS_BYTES[kind])))
    else:
        raise RemoteProtocolError("a proxy client named an unknown kind of address")
    return Endpoint(host, int.from_bytes(await stream.receive_exactly(2), "big"))


async def reply(stream: TcpStream, code: Reply, bound: Endpoint | None = None) -> None:
    """Answer a request; ``bound`` is the relay's address for UDP ASSOCIATE."""
    try:
        await stream.send_all(bytes((_VERSION, code, 0)) + pack_endpoint(bound or Endpoint("0.0.0.0", 0)))  # noqa: S104
    except NetworkError:
        return  # it no longer wants to know


def pack_endpoint(endpoint: Endpoint) -> bytes:
    """<kind><address><port> of an IP address."""
    address = ipaddress.ip_address(endpoint.host)
    return bytes((_IPV4 if address.version == 4 else _IPV6,)) + address.packed + endpoint.port.to_bytes(2, "big")


def wrap_datagram(source: Endpoint, data: bytes) -> bytes:
    """A datagram from the network as the client expects it from the relay."""
    return b"\0\0\0" + pack_endpoint(source) + data


def unwrap_datagram(datagram: bytes) -> tuple[Endpoint, bytes]:
    """(target, data) of a datagram from the client; ValueError if it is none or a fragment."""
    if len(datagram) < 10 or datagram[:3] != b"\0\0\0":
        raise ValueError("not a whole datagram for the relay")
    kind = datagram[3]
    if kind == _NAME:
        end = 5 + datagram[4]
        host = _name(datagram[5:end])
    elif kind in _ADDRESS_BYTES:
        end = 4 + _ADDRESS_BYTES[kind]
        host = str(ipaddress.ip_address(datagram[4:end]))
    else:
        raise ValueError("an unknown kind of address")
    if len(datagram) < end + 2:
        raise ValueError("too short for its address")
    return Endpoint(host, int.from_bytes(datagram[end : end + 2], "big")), datagram[end + 2 :]


def _name(raw: bytes) -> str:
    """A host name, or an address written as one."""
    return raw.decode("ascii", errors="replace")
