"""What the gateway may do and how long it waits: limits, times, and whom it may talk to. Pure values."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from torrentlm.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@dataclass(frozen=True, slots=True)
class Policy:
    """Times in seconds, sizes in bytes. ``networks``: the only ones to talk to; None means all."""

    networks: tuple[Network, ...] | None = None

    dial_limit: float = 5.0
    greeting_limit: float = 8.0
    """From an accepted connection to its complete greeting, and from ours to the answer."""
    join_limit: float = 8.0
    """How long an incoming connection waits for the client to come for it."""
    second_call: float = 1.0
    """After how long of that the client is told of it under another address."""
    hello_limit: float = 10.0
    """From a negotiated pipe extension to an authenticated peer."""

    pending_greetings: int = 256
    """Beyond this the connection that has been silent for longest makes room for a new one."""
    connections: int = 1000
    connections_per_host: int = 256

    queue_to_client: int = 16 << 20
    """Beyond this the network is not read until the client has taken some."""

    ping_every: float = 2.0
    silence_limit: float = 10.0
    """A peer that says nothing at all for this long is gone."""
    grace: float = 3.0
    """How long a pipe without a connection may live while a new one is dialed."""
    idle_limit: float = 300.0
    """A pipe whose connections carry nothing else is closed after this long without a message."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Policy:
        """With TORRENTLM_LOOPBACK_ONLY=1 nothing but loopback and the networks in TORRENTLM_ALLOWED_NETS is talked
        to."""
        if environment.get("TORRENTLM_LOOPBACK_ONLY", "0") in ("", "0"):
            return cls()
        names = environment.get("TORRENTLM_ALLOWED_NETS", "").split(",")
        try:
            allowed = tuple(ipaddress.ip_network(name.strip()) for name in names if name.strip())
        except ValueError as error:
            raise ConfigError(f"TORRENTLM_ALLOWED_NETS must list networks such as 10.1.0.0/16: {error}.") from error
        return cls(networks=_LOOPBACK + allowed)

    def allows(self, host: str) -> bool:
        """Whether this address may be talked to; names never are where networks are restricted."""
        if self.networks is None:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self.networks)
