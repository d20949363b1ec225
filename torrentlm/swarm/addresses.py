"""Host names to addresses, by ourselves: libtorrent wants numbers from us and gets no say in what is looked up."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable

import trio

from torrentlm.records import Endpoint

_LOOKUP_TIMEOUT = 5.0
_MAX_ADDRESSES = 4


def loopback_only() -> bool:
    """Whether this process was told to stay on this machine (``TORRENTLM_LOOPBACK_ONLY=1``)."""
    return os.environ.get("TORRENTLM_LOOPBACK_ONLY") == "1"


def is_address(host: str) -> bool:
    """Whether ``host`` is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def resolve(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The endpoints with names replaced by addresses, all looked up at once; names that do not resolve are left out.

    ``loopback_only``: no name but ``localhost`` is looked up.
    """
    found: dict[Endpoint, list[Endpoint]] = {endpoint: [] for endpoint in endpoints}

    async def look_up(endpoint: Endpoint) -> None:
        with trio.move_on_after(_LOOKUP_TIMEOUT):
            found[endpoint] = await _look_up(endpoint)

    async with trio.open_nursery() as nursery:
        for endpoint in found:
            nursery.start_soon(look_up, endpoint)
    return tuple(dict.fromkeys(address for addresses in found.values() for address in addresses))


async def _look_up(endpoint: Endpoint) -> list[Endpoint]:
    if is_address(endpoint.host):
        return [endpoint]
    if loopback_only() and not endpoint.is_loopback:
        return []
    try:
        entries = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [Endpoint(str(entry[4][0]), endpoint.port) for entry in entries[:_MAX_ADDRESSES]]
