"""Routes against brute force, and what is said when there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from torrentlm.records import Endpoint, NodeKey, Span
from torrentlm.route.plan import Hop, Missing, _costs, plan_route
from torrentlm.route.registry import Candidate, Snapshot

BLOCKS = 5
ALL = Span(0, BLOCKS - 1)


def candidate(
    number: int, *spans: Span, rtt: float | None = None, block: float | None = None, suspect: bool = False
) -> Candidate:
    key = NodeKey(bytes([number]) * 32)
    return Candidate(key, Endpoint("10.0.0.1", number), spans, rtt_s=rtt, block_s=block, suspect=suspect)


def snapshot(*candidates: Candidate) -> Snapshot:
    return Snapshot(candidates, known=len(candidates), answered=len(candidates))


def cost_of(route: tuple[Hop, ...], candidates: tuple[Candidate, ...]) -> float:
    by_node = {peer.node: _costs(peer) for peer in candidates}
    return sum(by_node[hop.node][0] + len(hop.span) * by_node[hop.node][1] for hop in route)


def brute_force(candidates: tuple[Candidate, ...], blocks: Span) -> float | None:
    """The cheapest cost over every assignment of these blocks to candidates."""
    costs = [_costs(peer) for peer in candidates]
    best = None
    serving = [[i for i, peer in enumerate(candidates) if any(b in s for s in peer.resident)] for b in blocks]
    for chosen in product(*serving):
        total = sum(
            costs[i][1] + (costs[i][0] if place == 0 or chosen[place - 1] != i else 0) for place, i in enumerate(chosen)
        )
        best = total if best is None else min(best, total)
    return best


spans = st.integers(0, BLOCKS - 1).flatmap(lambda a: st.builds(Span, st.just(a), st.integers(a, BLOCKS - 1)))
peers = st.tuples(
    st.lists(spans, min_size=1, max_size=2),
    st.none() | st.floats(0, 1),
    st.none() | st.floats(0.0001, 0.5),
    st.booleans(),
)


@given(st.lists(peers, max_size=5), st.just(ALL) | spans)
def test_the_route_is_the_cheapest_there_is(described, blocks):
    candidates = tuple(
        candidate(number + 1, *held, rtt=rtt, block=block, suspect=suspect)
        for number, (held, rtt, block, suspect) in enumerate(described)
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
