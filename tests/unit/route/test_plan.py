"""Routes against brute force, and what is said when there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from torrentlm.records import Endpoint, Lane, NodeKey, Span
from torrentlm.route.plan import LANE_S, Hop, Missing, _block_cost, _device_of, _entry_cost, _lane_of, plan_route
from torrentlm.route.registry import Candidate, Snapshot

BLOCKS = 5
ALL = Span(0, BLOCKS - 1)


def candidate(
    number: int,
    *spans: Span,
    rtt: float | None = None,
    block: float | None = None,
    suspect: bool = False,
    lanes: tuple[Lane, ...] = (),
) -> Candidate:
    key = NodeKey(bytes([number]) * 32)
    place = Endpoint("10.0.0.1", number)
    return Candidate(key, place, spans, rtt_s=rtt, block_s=block, suspect=suspect, lanes=lanes)


def snapshot(*candidates: Candidate) -> Snapshot:
    return Snapshot(candidates, known=len(candidates), answered=len(candidates))


def cost_of(route: tuple[Hop, ...], candidates: tuple[Candidate, ...]) -> float:
    by_node = {peer.node: peer for peer in candidates}
    total, before = 0.0, None
    for hop in route:
        peer = by_node[hop.node]
        [_] = {_device_of(peer, block) for block in hop.span}  # no hop is more than one device's
        enter = _entry_cost(peer)
        total += min(enter, LANE_S) if before == hop.node else enter
        total += sum(_block_cost(peer, _lane_of(peer, block)) for block in hop.span)
        before = hop.node
    return total


def brute_force(candidates: tuple[Candidate, ...], blocks: Span) -> float | None:
    """The cheapest cost over every assignment of these blocks to candidates."""
    enter = [_entry_cost(peer) for peer in candidates]
    run = [[_block_cost(peer, _lane_of(peer, block)) for block in blocks] for peer in candidates]
    devices = [[_device_of(peer, block) for block in blocks] for peer in candidates]
    best = None

    def change(place: int, before: int | None, now: int) -> float:
        if before != now:
            return enter[now]
        return 0.0 if devices[now][place] == devices[now][place - 1] else min(enter[now], LANE_S)

    serving = [[i for i, peer in enumerate(candidates) if any(b in s for s in peer.resident)] for b in blocks]
    for chosen in product(*serving):
        total = sum(
            run[i][place] + change(place, chosen[place - 1] if place else None, i) for place, i in enumerate(chosen)
        )
        best = total if best is None else min(best, total)
    return best


spans = st.integers(0, BLOCKS - 1).flatmap(lambda a: st.builds(Span, st.just(a), st.integers(a, BLOCKS - 1)))
lanes = st.builds(
    Lane,
    spans,
    block_ms=st.just(0.0) | st.floats(0.1, 500),
    sessions=st.integers(0, 2),
    number=st.integers(0, 2),
)
peers = st.tuples(
    st.lists(spans, min_size=1, max_size=2),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0.0001, 0.5),
    st.booleans(),
    st.lists(lanes, max_size=3).map(tuple),  # whatever a peer says, overlapping ones too
)


@given(st.lists(peers, max_size=5), st.just(ALL) | spans)
def test_the_route_is_the_cheapest_there_is(described, blocks):
    candidates = tuple(
        candidate(number + 1, *held, rtt=rtt, block=block, suspect=suspect, lanes=lanes)
        for number, (held, rtt, block, suspect, lanes) in enumerate(described)
    )
    best = brute_force(candidates, blocks)
    route = plan_route(snapshot(*candidates), blocks)
    if best is None:
        assert isinstance(route, Missing)
        assert route.block in blocks
        assert not any(route.block in span for peer in candidates for span in peer.resident)
        return
    assert not isinstance(route, Missing)
    assert [block for hop in route for block in hop.span] == list(blocks)
    by_node = {peer.node: peer for peer in candidates}
    assert all(any(block in span for span in by_node[hop.node].resident) for hop in route for block in hop.span)
    assert abs(cost_of(route, candidates) - best) < 1e-9


def test_one_holder_of_everything_is_one_hop():
    route = plan_route(snapshot(candidate(1, Span(0, 2)), candidate(2, Span(0, 4)), candidate(3, Span(2, 4))), ALL)
    assert not isinstance(route, Missing)
    assert [str(hop.span) for hop in route] == ["0-4"]


def two_devices(number: int, **given: float) -> Candidate:
    return candidate(number, Span(0, 4), lanes=(Lane(Span(0, 1)), Lane(Span(2, 4), number=1)), **given)


def test_two_devices_of_one_holder_are_two_hops() -> None:
    route = plan_route(snapshot(candidate(1, Span(0, 2)), two_devices(2), candidate(3, Span(2, 4))), ALL)
    assert not isinstance(route, Missing)
    assert [(hop.endpoint.port, str(hop.span)) for hop in route] == [(2, "0-1"), (2, "2-4")]
    part = plan_route(snapshot(two_devices(2)), Span(1, 2))
    assert not isinstance(part, Missing)
    assert [str(hop.span) for hop in part] == ["1", "2"]


def test_each_device_has_its_own_sessions_and_time() -> None:
    busy = replace(two_devices(1), lanes=(Lane(Span(0, 1)), Lane(Span(2, 4), block_ms=2, sessions=20, number=1)))
    route = plan_route(snapshot(busy, candidate(2, Span(0, 4), block=0.01)), ALL)
    assert not isinstance(route, Missing)
    assert [(hop.endpoint.port, str(hop.span)) for hop in route] == [(2, "0-4")]
    near = plan_route(snapshot(replace(busy, rtt_s=0.001), candidate(2, Span(0, 4), block=0.01, rtt=0.001)), ALL)
    assert not isinstance(near, Missing)
    assert [(hop.endpoint.port, str(hop.span)) for hop in near] == [(1, "0-1"), (2, "2-4")]


def offloading(number: int, block_ms: float, **given: float) -> Candidate:
    """Blocks 2 and 3 stay in its RAM."""
    lanes = (Lane(Span(0, 1)), Lane(Span(2, 3), block_ms=block_ms), Lane(Span(4, 4)))
    return candidate(number, Span(0, 4), lanes=lanes, **given)


def test_offloaded_blocks_are_run_only_where_that_is_faster_than_going_elsewhere() -> None:
    def chosen(block_ms: float, rtt: float) -> list[tuple[int, str]]:
        peers = snapshot(offloading(1, block_ms, rtt=0.001), candidate(2, Span(2, 3), rtt=rtt, block=0.002))
        route = plan_route(peers, ALL)
        assert not isinstance(route, Missing)
        return [(hop.endpoint.port, str(hop.span)) for hop in route]

    around = [(1, "0-1"), (2, "2-3"), (1, "4")]
    # There and back is half a round trip each: 2 × 2 ms and 20.5 ms, or twice what copying takes.
    assert chosen(block_ms=10, rtt=0.040) == [(1, "0-4")]  # in one hop, since it is one device
    assert chosen(block_ms=13, rtt=0.040) == around
    assert chosen(block_ms=13, rtt=0.080) == [(1, "0-4")]
    assert chosen(block_ms=100, rtt=0.080) == around


def test_offloaded_blocks_are_run_where_nobody_else_has_them() -> None:
    route = plan_route(snapshot(offloading(1, 900), candidate(2, Span(0, 2))), ALL)
    assert not isinstance(route, Missing)
    assert [(hop.endpoint.port, str(hop.span)) for hop in route] == [(2, "0-2"), (1, "3-4")]


def test_a_suspect_is_the_last_choice():
    fast = candidate(1, Span(0, 4), rtt=0.001, block=0.001, suspect=True)
    slow = candidate(2, Span(0, 4), rtt=0.5, block=0.1)
    route = plan_route(snapshot(fast, slow), ALL)
    assert not isinstance(route, Missing)
    assert {hop.node for hop in route} == {slow.node}


def test_the_first_missing_block_is_named():
    assert plan_route(snapshot(candidate(1, Span(0, 1)), candidate(2, Span(4, 4))), ALL) == Missing(2)
    assert plan_route(snapshot(), ALL) == Missing(0)
    assert plan_route(snapshot(candidate(1, Span(0, 1))), Span(2, 4)) == Missing(2)


def test_adapted_blocks_go_to_holders_that_apply_adapters() -> None:
    plain, applies = candidate(1, Span(0, 4), rtt=0.001), replace(candidate(2, Span(1, 4), block=0.5), adapters=1000)
    both, whole = snapshot(plain, applies), Span(0, BLOCKS - 1)

    def chosen(adapted: frozenset[int]) -> list[tuple[int, str]]:
        route = plan_route(both, whole, adapted)
        assert not isinstance(route, Missing)
        return [(hop.endpoint.port, str(hop.span)) for hop in route]

    assert chosen(frozenset()) == [(1, "0-4")]
    assert chosen(frozenset({2, 3})) == [(1, "0-1"), (2, "2-3"), (1, "4")]
    assert plan_route(both, whole, frozenset({0})) == Missing(0)
    assert plan_route(snapshot(plain), whole, frozenset({4})) == Missing(4)
