"""Whom this node, where it had a torrent first, gives pieces of it: one peer at a time, while the peers trade.

When several peers fetch the same torrents at once, each asks every source for all that it lacks, and a source that is
unchoked for all sends each piece many times over. Here each torrent has one peer whose turn it is; the others get its
pieces from that peer, and find their own turns at other torrents. So what this node sends is close to one copy, and
the peers' uplinks do the rest. Choked is what a peer is whose turn it is not (BEP 3): any client understands that.

``share_out`` and ``share_with`` decide, about plain values. :class:`Turns` owns who wants what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import trio

from torrentlm.records import Endpoint, InfoHash

EVERY_S = 0.25
LENGTH_S = 20.0
"""After so long a turn is another peer's, if one waits: a slow one must not keep what it has."""
STALL_S = 3.0
"""A turn that moved nothing for so long is over."""
PATIENCE_S = 3.0
"""A peer without any turn that gets nothing from the others either shares one after so long."""

Turn = tuple[InfoHash, Endpoint]
Wishes = Mapping[InfoHash, Mapping[Endpoint, float]]
"""Who wants a torrent, and when each last had a turn (``NEVER``: it had none)."""

NEVER = float("-inf")


def share_out(wishes: Wishes, turns: Mapping[InfoHash, Endpoint]) -> dict[InfoHash, Endpoint]:
    """The turns from now on: one for each torrent that somebody wants, as even as may be over the peers.

    ``turns`` stay, unless a peer with at least two fewer wants the torrent, too. Which of equal peers is first hangs on
    both names.
    """
    chosen = {torrent: peer for torrent, peer in turns.items() if peer in wishes.get(torrent, ())}
    count = Counter(chosen.values())
    for torrent in sorted(wishes.keys() - chosen.keys()):
        peers = wishes[torrent]
        first = min(peers, key=lambda peer: (count[peer], peers[peer], _draw(torrent, peer)))
        chosen[torrent] = first
        count[first] += 1
    _even_out(wishes, chosen, count)
    return chosen


def share_with(wishes: Wishes, waiting: Collection[Endpoint]) -> set[Turn]:
    """Turns beside those of others for peers that have none, spread over the torrents that they want."""
    found: set[Turn] = set()
    fullness = Counter[InfoHash]()
    for peer in sorted(waiting):
        if wanted := [torrent for torrent, peers in wishes.items() if peer in peers]:
            torrent = min(wanted, key=lambda torrent: (fullness[torrent], _draw(torrent, peer)))
            fullness[torrent] += 1
            found.add((torrent, peer))
    return found


def _even_out(wishes: Wishes, chosen: dict[InfoHash, Endpoint], count: Counter[Endpoint]) -> None:
    """Take turns from who has at least two more than another that wants the torrent. Each move makes the counts more
    even, so it ends."""
    moved = True
    while moved:
        moved = False
        for torrent, peer in sorted(chosen.items()):
            least = min(wishes[torrent], key=lambda other: (count[other], _draw(torrent, other)))
            if count[least] + 2 <= count[peer]:
                chosen[torrent] = least
                count[peer] -= 1
                count[least] += 1
                moved = True


def _draw(torrent: InfoHash, peer: Endpoint) -> bytes:
    return blake2b(torrent + str(peer).encode(), digest_size=8).digest()


class Gate(Protocol):
    """A connection as far as turns go."""

    @property
    def sent(self) -> int:
        """Bytes of the client that have left for the network so far."""

    def let(self, open: bool) -> None:
        """Unchoke the peer, or choke it."""


@dataclass(slots=True)
class _Seat:
    """A connection that may have a turn. ``had`` is when its last one ended."""

    gate: Gate
    turn: Turn
    offered: bool = False
    interested: bool = False
    open: bool = False
    had: float = NEVER
    since: float = 0.0
    sent: int = 0
    moved_at: float = 0.0

    @property
    def wants(self) -> bool:
        return self.offered and self.interested


class Turns:
    """Of all connections whose torrents this node had first, by their numbers; ``run`` is a service."""

    def __init__(self) -> None:
        self._seats: dict[int, _Seat] = {}
        self._wanting = Counter[InfoHash]()  # how many want each
        self._turns: dict[InfoHash, Endpoint] = {}
        # Who wants something, has no turn of its own and gets nothing from others, since when.
        self._without: dict[Endpoint, float] = {}
        self._changed = trio.Event()

    def enter(self, number: int, torrent: InfoHash, peer: Endpoint, gate: Gate) -> None:
        """A connection has begun, on which nobody is unchoked yet."""
        self._seats[number] = _Seat(gate, (torrent, peer))

    def leave(self, number: int) -> None:
        """A connection has ended, or the client has left it."""
        if (seat := self._seats.get(number)) is not None:
            self._wish(seat, offered=False, interested=False)
            del self._seats[number]

    def offer(self, number: int, offered: bool) -> bool:
        """Our client unchokes the peer, or chokes it. Whether the peer may be told so now."""
        seat = self._seats.get(number)
        return seat is None or self._wish(seat, offered, seat.interested) or not offered

    def interest(self, number: int, interested: bool) -> None:
        """The peer wants something that our client has, or nothing any more."""
        seat = self._seats.get(number)
        if seat is not None:
            was_open = seat.open
            if self._wish(seat, seat.offered, interested):
                seat.gate.let(True)
            elif was_open and not seat.open:
                seat.gate.let(False)

    def has_more(self, number: int) -> None:
        """The peer has got a piece, from whomever."""
        seat = self._seats.get(number)
        if seat is not None and (peer := seat.turn[1]) in self._without:
            self._without[peer] = trio.current_time()

    def _wish(self, seat: _Seat, offered: bool, interested: bool) -> bool:
        """True if the seat's turn begins at once, since nobody else is there."""
        torrent, peer = seat.turn
        self._wanting[torrent] -= seat.wants
        seat.offered, seat.interested = offered, interested
        self._wanting[torrent] += seat.wants
        if seat.wants and not seat.open and self._wanting[torrent] == 1:
            self._turns[torrent] = peer
            self._begin(seat)
            return True
        if seat.open and not seat.wants:
            seat.open, seat.had = False, trio.current_time()
        if not self._wanting[torrent]:
            del self._wanting[torrent]
        self._changed.set()
        return False

    async def run(self) -> None:
        """Share out the turns as wishes change and time goes by, until cancelled."""
        while True:
            if not self._wanting:
                await self._changed.wait()
            await trio.sleep(EVERY_S)
            self._changed = trio.Event()
            self._share_out()

    def _share_out(self) -> None:
        now = trio.current_time()
        seats = {seat.turn: seat for seat in self._seats.values() if seat.wants}
        over = {
            turn for turn, seat in seats.items() if seat.open and self._wanting[turn[0]] > 1 and not _goes_on(seat, now)
        }
        wishes: dict[InfoHash, dict[Endpoint, float]] = {}
        for (torrent, peer), seat in seats.items():
            if (torrent, peer) not in over:
                wishes.setdefault(torrent, {})[peer] = seat.had
        self._turns = share_out(wishes, self._turns)
        without = {peer for peers in wishes.values() for peer in peers} - set(self._turns.values())
        self._without = {peer: self._without.get(peer, now) for peer in without}
        waiting = {peer for peer, since in self._without.items() if now - since >= PATIENCE_S}
        chosen = set(self._turns.items()) | share_with(wishes, waiting)
        for seat in self._seats.values():
            if seat.open and seat.turn not in chosen:
                seat.open, seat.had = False, now
                seat.gate.let(False)
            elif not seat.open and seat.wants and seat.turn in chosen:
                self._begin(seat)
                seat.gate.let(True)

    def _begin(self, seat: _Seat) -> None:
        now = trio.current_time()
        seat.open, seat.since, seat.moved_at, seat.sent = True, now, now, seat.gate.sent


def _goes_on(seat: _Seat, now: float) -> bool:
    """Whether a turn may last, where others wait for it."""
    if seat.gate.sent != seat.sent:
        seat.sent, seat.moved_at = seat.gate.sent, now
    return now - seat.since < LENGTH_S and now - seat.moved_at < STALL_S
