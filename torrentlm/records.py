"""Ids and records: the nouns that every layer shares. Plain values, no I/O, standard library only."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NewType

NodeKey = NewType("NodeKey", bytes)
"""A node's Ed25519 public key, 32 bytes: who a peer is, whatever its address."""

SessionId = NewType("SessionId", bytes)
"""16 random bytes chosen by the client: the handle of one session's KV-cache on every holder of its route."""

InfoHash = NewType("InfoHash", bytes)
"""20 bytes as they stand in a BEP 3 handshake and in the DHT: a v1 info-hash or a truncated v2 one (BEP 52)."""


@dataclass(frozen=True, slots=True)
class AdapterId:
    """An adapter torrent's info-hashes: ``v1`` 20 bytes, ``v2`` 32 bytes."""

    v1: bytes
    v2: bytes


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """Where a node listens: TCP and UDP on the same port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``host:port`` or ``[v6]:port``; raise ValueError with the reason otherwise."""
        host, separator, port = text.strip().rpartition(":")
        if not separator or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{text!r} is not HOST:PORT")
        host = host.removeprefix("[").removesuffix("]")
        if not host:
            raise ValueError(f"{text!r} has no host before the port")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Consecutive blocks, both ends included, that one holder runs as one hop."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"{self.first}-{self.last} is not a range of blocks")

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.first <= block <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else f"{self.first}"


def spans_of(blocks: Iterable[int]) -> tuple[Span, ...]:
    """The fewest spans that cover exactly these blocks, in order."""
    spans: list[Span] = []
    for block in sorted(set(blocks)):
        if spans and spans[-1].last + 1 == block:
            spans[-1] = Span(spans[-1].first, block)
        else:
            spans.append(Span(block, block))
    return tuple(spans)


@dataclass(frozen=True, slots=True)
class Lane:
    """Blocks of a model that one device of a node runs: those in its memory, or those that are offloaded, which take
    longer. ``number`` says which device: a hop of a route is within one. The other fields are as in PeerRecord.
    """

    span: Span
    device: str = "cpu"
    precision: str = "F32"
    block_ms: float = 0.0
    sessions: int = 0
    number: int = 0


MAX_LANES = 32
"""Devices that one node computes on; it leaves more of them alone. A record has as many Lanes at most."""


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What a node says of itself for one model: first message on a pipe, and its BEP 44 item.

    ``model`` is the v2 info-hash (32 bytes) of the model torrent. ``held`` are blocks complete on disk, ``resident``
    those that it has in memory and serves, ``offered`` those that it serves, too, but may have to load first,
    ``claimed`` those that it is fetching to serve. ``memory_free`` in bytes; ``block_ms`` is its measured time for one
    layer block and one token, in milliseconds (0: not measured yet). ``sequence`` grows with every change.
    ``adapters``: bytes of adapters that it takes for sessions (0: it applies none). ``fetching``: blocks of which
    pieces are still to come, whatever it wants them for. ``lanes``: which of ``resident`` and ``offered`` each of its
    devices runs; () where there is only one, and nothing is offloaded.
    """

    node: NodeKey
    model: bytes
    port: int
    sequence: int = 0
    held: tuple[Span, ...] = ()
    resident: tuple[Span, ...] = ()
    claimed: tuple[Span, ...] = ()
    device: str = "cpu"
    precision: str = "F32"
    memory_free: int = 0
    block_ms: float = 0.0
    sessions: int = 0
    adapters: int = 0
    offered: tuple[Span, ...] = ()
    fetching: tuple[Span, ...] = ()
    lanes: tuple[Lane, ...] = ()


RANGES: dict[str, tuple[int, int] | tuple[float, float]] = {
    "max_new_tokens": (1, 2**24 - 1),
    "temperature": (0.0, 1e3),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "seed": (0, 2**64 - 1),
}
"""Lowest and highest value of what a generation is asked with; whole numbers for those that are."""
MAX_STOPS = 16
MAX_STOP_BYTES = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the head picks a token; the defaults are greedy. Meanings and order are those of transformers' warpers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Stop:
    """When the head ends a generation, besides the token budget."""

    tokens: tuple[int, ...] = ()
    strings: tuple[str, ...] = field(default=())
