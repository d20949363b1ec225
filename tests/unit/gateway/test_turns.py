"""Whose turn it is: the decision for any wishes, and the turns of connections as time goes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.gateway.turns import LENGTH_S, NEVER, PATIENCE_S, STALL_S, Turns, share_out, share_with
from torrentlm.records import Endpoint, InfoHash

TORRENTS = [InfoHash(bytes([number]) * 20) for number in range(9)]
PEERS = [Endpoint("127.0.0.1", 1000 + number) for number in range(9)]
TIMES = st.one_of(st.just(NEVER), st.floats(0, 100))
WISHES = st.dictionaries(st.sampled_from(TORRENTS), st.dictionaries(st.sampled_from(PEERS), TIMES, min_size=1))
TURNS = st.dictionaries(st.sampled_from(TORRENTS), st.sampled_from(PEERS))
Wishes = dict[InfoHash, dict[Endpoint, float]]


@given(WISHES, TURNS)
def test_each_wanted_torrent_is_the_turn_of_somebody_who_wants_it(
    wishes: Wishes, turns: dict[InfoHash, Endpoint]
) -> None:
    found = share_out(wishes, turns)
    assert found.keys() == wishes.keys()
    assert all(peer in wishes[torrent] for torrent, peer in found.items())


@given(WISHES, TURNS)
def test_nobody_could_be_helped_by_one_who_has_two_more(wishes: Wishes, turns: dict[InfoHash, Endpoint]) -> None:
    found = share_out(wishes, turns)
    count = Counter(found.values())
    assert all(count[peer] <= count[other] + 1 for torrent, peer in found.items() for other in wishes[torrent])


@given(WISHES, TURNS)
def test_turns_last(wishes: Wishes, turns: dict[InfoHash, Endpoint]) -> None:
    found = share_out(wishes, turns)
    assert share_out(wishes, found) == found


@given(WISHES, st.sets(st.sampled_from(PEERS)))
def test_who_has_waited_shares_one_turn(wishes: Wishes, waiting: set[Endpoint]) -> None:
    found = share_with(wishes, waiting)
    due = waiting & {peer for peers in wishes.values() for peer in peers}
    assert Counter(peer for _, peer in found) == dict.fromkeys(due, 1)
    assert all(peer in wishes[torrent] for torrent, peer in found)


def test_who_had_a_turn_comes_last() -> None:
    [torrent], (first, second) = TORRENTS[:1], PEERS[:2]
    assert share_out({torrent: {first: 5.0, second: NEVER}}, {}) == {torrent: second}
    assert share_out({torrent: {first: 5.0, second: 7.0}}, {}) == {torrent: first}


def on_a_mock_clock(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@dataclass(eq=False)
class FakeGate:
    """A peer that takes ``rate`` bytes per second while it may."""

    rate: float = 1e5
    begun: float = field(default_factory=trio.current_time)
    open: bool = False
    had: float = 0.0

    @property
    def sent(self) -> int:
        return int(self.had + (trio.current_time() - self.begun) * self.rate * self.open)

    def let(self, open: bool) -> None:
        self.had, self.begun, self.open = self.sent, trio.current_time(), open


class Source:
    """Turns with connections of all ``peers`` for all ``torrents``, everybody interested in everything."""

    def __init__(self, torrents: int, rates: list[float]) -> None:
        self.turns = Turns()
        self.gates: dict[tuple[int, int], FakeGate] = {}
        self.numbers: dict[tuple[int, int], int] = {}
        for torrent in range(torrents):
            for peer, rate in enumerate(rates):
                self.add(torrent, peer, rate)

    def add(self, torrent: int, peer: int, rate: float = 1e5) -> None:
        gate, number = FakeGate(rate), len(self.numbers)
        self.gates[torrent, peer], self.numbers[torrent, peer] = gate, number
        self.turns.enter(number, TORRENTS[torrent], PEERS[peer], gate)
        self.turns.interest(number, True)
        if self.turns.offer(number, True):
            gate.let(True)

    @property
    def open(self) -> set[tuple[int, int]]:
        return {place for place, gate in self.gates.items() if gate.open}


@asynccontextmanager
async def running(source: Source) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.turns.run)
        yield
        nursery.cancel_scope.cancel()


@on_a_mock_clock
async def test_the_first_waits_for_nobody_and_others_for_their_turn() -> None:
    source = Source(1, [1e5, 1e5])
    assert source.open == {(0, 0)}
    async with running(source):
        await trio.sleep(1)
        assert source.open == {(0, 0)}
        source.turns.interest(source.numbers[0, 0], False)
        await trio.sleep(1)
        assert source.open == {(0, 1)}


@on_a_mock_clock
async def test_choked_and_unchoked_again_at_once() -> None:
    """By the client, which says so itself, or as the peer has lost interest and found it again."""
    source = Source(1, [1e5])
    number, gate = source.numbers[0, 0], source.gates[0, 0]
    assert source.turns.offer(number, False) and gate.open  # what the client says passes
    assert source.turns.offer(number, True)
    source.turns.interest(number, False)
    assert not gate.open
    source.turns.interest(number, True)
    assert gate.open


@on_a_mock_clock
async def test_many_torrents_are_shared_out() -> None:
    source = Source(8, [1e5] * 4)
    async with running(source):
        await trio.sleep(1)
        assert Counter(peer for _, peer in source.open) == {0: 2, 1: 2, 2: 2, 3: 2}
        assert Counter(torrent for torrent, _ in source.open) == dict.fromkeys(range(8), 1)


@on_a_mock_clock
async def test_a_peer_that_takes_nothing_loses_its_turn() -> None:
    source = Source(1, [0.0, 1e5])
    async with running(source):
        await trio.sleep(STALL_S - 0.5)
        assert source.open == {(0, 0)}
        await trio.sleep(1)
        assert source.open == {(0, 1)}


@on_a_mock_clock
async def test_a_slow_peer_does_not_keep_a_turn_for_ever() -> None:
    source = Source(2, [10.0, 1e5])
    async with running(source):
        await trio.sleep(1)
        [slow] = [torrent for torrent, peer in source.open if peer == 0]
        await trio.sleep(LENGTH_S)
        assert (slow, 1) in source.open


@on_a_mock_clock
async def test_who_has_no_turn_waits_only_so_long() -> None:
    source = Source(1, [1e5, 1e5, 1e5])
    async with running(source):
        await trio.sleep(PATIENCE_S - 0.5)
        assert len(source.open) == 1
        await trio.sleep(1)
        assert len(source.open) == 3


@on_a_mock_clock
async def test_who_gets_something_from_others_goes_on_waiting() -> None:
    source = Source(1, [1e5, 1e5])
    async with running(source):
        for _ in range(5):
            await trio.sleep(PATIENCE_S - 0.5)
            source.turns.has_more(source.numbers[0, 1])
        assert source.open == {(0, 0)}
        await trio.sleep(PATIENCE_S + 0.5)
        assert source.open == {(0, 0), (0, 1)}


@on_a_mock_clock
async def test_one_that_has_left_holds_nobody_up() -> None:
    source = Source(1, [1e5, 1e5])
    async with running(source):
        source.turns.leave(source.numbers[0, 0])
        await trio.sleep(1)
        assert (0, 1) in source.open


@on_a_mock_clock
async def test_connections_that_never_entered_are_let_through() -> None:
    turns = Turns()
    turns.interest(7, True)
    assert turns.offer(7, True) and turns.offer(7, False)
    turns.leave(7)
