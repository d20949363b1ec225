"""What this node knows of the peers of one model: their records, what was measured, what failed.

State without I/O and without a clock: whoever owns it says what happened and when (seconds, any monotonic clock).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torrentlm.records import Endpoint, Lane, NodeKey, PeerRecord, Span

SMOOTHING = 0.25
"""Weight of the newest round trip in its moving average."""

FAILURE_MEMORY_S = 30.0
"""For how long a failure makes a peer the last choice."""

MAX_PEERS = 1000
"""Peers, and endpoints that have not answered: of each so many are remembered."""


@dataclass(slots=True)
class _Peer:
    endpoint: Endpoint
    record: PeerRecord | None = None
    rtt_s: float | None = None
    failed_at: float | None = None
    connected: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One peer as a route sees it. ``rtt_s`` in seconds (None: not measured), ``block_s`` per layer block and token.

    ``adapters``: bytes of adapters that it takes for sessions. ``lanes``: as in its record.
    """

    node: NodeKey
    endpoint: Endpoint
    resident: tuple[Span, ...]
    held: tuple[Span, ...] = ()
    claimed: tuple[Span, ...] = ()
    offered: tuple[Span, ...] = ()
    fetching: tuple[Span, ...] = ()
    rtt_s: float | None = None
    block_s: float | None = None
    sessions: int = 0
    adapters: int = 0
    suspect: bool = False
    lanes: tuple[Lane, ...] = ()

    @property
    def has_blocks(self) -> bool:
        """Whether it serves, has on disk, or is fetching any block; clients do not."""
        return bool(self.resident or self.held or self.claimed or self.fetching)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The registry at one moment. ``known`` peers were heard of, ``answered`` ones sent their record."""

    candidates: tuple[Candidate, ...]
    known: int
    answered: int


class Registry:
    """The one owner of what is known about the peers of one model."""

    def __init__(self, own: NodeKey) -> None:
        self._own = own
        self._peers: dict[NodeKey, _Peer] = {}
        self._silent: dict[Endpoint, None] = {}  # the oldest first

    def heard_of(self, endpoint: Endpoint) -> None:
        """An endpoint that may turn out to be a peer; it counts as known until it answers."""
        if all(peer.endpoint != endpoint for peer in self._peers.values()):
            self._silent[endpoint] = None
            if len(self._silent) > MAX_PEERS:
                del self._silent[next(iter(self._silent))]

    def retain(self, endpoints: Collection[Endpoint]) -> None:
        """Forget everybody who is neither connected nor at one of ``endpoints``: nobody tries them any more."""
        self._silent = {endpoint: None for endpoint in self._silent if endpoint in endpoints}
        self._peers = {node: peer for node, peer in self._peers.items() if peer.connected or peer.endpoint in endpoints}

    def connected(self, node: NodeKey, endpoint: Endpoint) -> None:
        """A pipe to ``node`` is there. With ``MAX_PEERS`` of them connected already, it is not remembered."""
        self._silent.pop(endpoint, None)
        if node not in self._peers and not self._make_room():
            return
        peer = self._peers.setdefault(node, _Peer(endpoint))
        if not peer.connected:
            peer.record = None  # a restarted node counts its records from 0 again, and begins with one
        peer.endpoint = endpoint
        peer.connected = True

    def _make_room(self) -> bool:
        if len(self._peers) < MAX_PEERS:
            return True
        gone = next((node for node, peer in self._peers.items() if not peer.connected), None)
        if gone is None:
            return False
        del self._peers[gone]
        return True

    def disconnected(self, node: NodeKey) -> None:
        """Its pipe ended. A holder may come back, and what it holds is remembered; anybody else was passing through."""
        if peer := self._peers.get(node):
            peer.connected = False
            if peer.record is None or not (peer.record.resident or peer.record.held or peer.record.claimed):
                del self._peers[node]

    def record(self, record: PeerRecord) -> bool:
        """Take a peer's record; True if it says something new. Records of peers never connected to are ignored."""
        peer = self._peers.get(record.node)
        if peer is None or record.node == self._own:
            return False
        if peer.record is not None and record.sequence < peer.record.sequence:
            return False
        changed = peer.record != record
        peer.record = record
        return changed

    def round_trip(self, node: NodeKey, seconds: float) -> None:
        if peer := self._peers.get(node):
            old = peer.rtt_s
            peer.rtt_s = seconds if old is None else old + SMOOTHING * (seconds - old)

    def failed(self, node: NodeKey, now: float) -> None:
        if peer := self._peers.get(node):
            peer.failed_at = now

    def snapshot(self, now: float) -> Snapshot:
        """Connected peers with a record, in the order of their keys."""
        candidates = tuple(
            Candidate(
                node=node,
                endpoint=peer.endpoint,
                resident=peer.record.resident,
                held=peer.record.held,
                claimed=peer.record.claimed,
                offered=peer.record.offered,
                fetching=peer.record.fetching,
                rtt_s=peer.rtt_s,
                block_s=peer.record.block_ms / 1000 or None,
                sessions=peer.record.sessions,
                adapters=peer.record.adapters,
                suspect=peer.failed_at is not None and now - peer.failed_at < FAILURE_MEMORY_S,
                lanes=peer.record.lanes,
            )
            for node, peer in sorted(self._peers.items())
            if peer.record is not None and peer.connected
        )
        return Snapshot(candidates, known=len(self._peers) + len(self._silent), answered=len(candidates))
