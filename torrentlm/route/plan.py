"""From a snapshot to a route: the cheapest chain of spans that covers every block. Pure functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torrentlm.records import Endpoint, Lane, NodeKey, Span
from torrentlm.route.registry import Candidate, Snapshot

UNMEASURED_RTT_S = 0.050
UNMEASURED_BLOCK_S = 0.002
SUSPECT_PENALTY_S = 10.0
LANE_S = 0.0005
"""To go on with another device of the same holder: no network, but an input and a result more."""
LOAD_PENALTY_S = 1.0
"""For a block that its holder would have to load first: more than any detour, less than asking somebody who failed."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One holder's part of a route, or one device's of it."""

    node: NodeKey
    endpoint: Endpoint
    span: Span


@dataclass(frozen=True, slots=True)
class Missing:
    """The first block that no candidate serves."""

    block: int


def _load_cost(candidate: Candidate, block: int) -> float | None:
    """Seconds to have this block in memory there; None if the candidate does not serve it."""
    if any(block in span for span in candidate.resident):
        return 0.0
    return LOAD_PENALTY_S if any(block in span for span in candidate.offered) else None


def _entry_cost(candidate: Candidate) -> float:
    """Seconds to enter this holder."""
    rtt = UNMEASURED_RTT_S if candidate.rtt_s is None else candidate.rtt_s
    return rtt / 2 + SUSPECT_PENALTY_S * candidate.suspect


def _block_cost(candidate: Candidate, lane: Lane | None) -> float:
    """Seconds per block once there."""
    measured = candidate.block_s if lane is None else lane.block_ms / 1000 or None
    sessions = candidate.sessions if lane is None else lane.sessions
    return (UNMEASURED_BLOCK_S if measured is None else measured) * (1 + sessions)


def _lane_of(candidate: Candidate, block: int) -> Lane | None:
    """What the holder says of this block's device and time; None where it has but one of both."""
    return next((lane for lane in candidate.lanes if block in lane.span), None)


def _device_of(candidate: Candidate, block: int) -> int | None:
    """Which of the holder's devices runs this block; None where it has but one."""
    lane = _lane_of(candidate, block)
    return None if lane is None else lane.number


def plan_route(snapshot: Snapshot, blocks: Span, adapted: Collection[int] = ()) -> tuple[Hop, ...] | Missing:
    """The route through ``blocks`` with the lowest expected seconds per token, or the first block that keeps it from
    existing.

    ``adapted`` are the blocks that the session's adapter changes: only holders that apply adapters come in for them.

    A shortest path over (block, holder) states: staying with a holder costs its time per block, changing to one costs
    half its round trip more, and going on with another of its devices next to nothing. Each block of a holder is run by
    one of its devices, so (block, holder) says which. Changing is always from the cheapest state of the block before,
    so the work is blocks × candidates. Ties go to the smaller node key, so that equal snapshots give equal routes.
    """
    candidates = snapshot.candidates
    entry = [_entry_cost(candidate) for candidate in candidates]
    best: list[dict[int, tuple[float, int | None]]] = []
    for block in blocks:
        states: dict[int, tuple[float, int | None]] = {}
        before = best[-1] if best else None
        cheapest = min(before, key=lambda i: (before[i][0], i)) if before else None
        for index, candidate in enumerate(candidates):
            load = _load_cost(candidate, block)
            if load is None or (block in adapted and not candidate.adapters):
                continue
            lane = _lane_of(candidate, block)
            enter, run = entry[index], _block_cost(candidate, lane) + load
            if before is None or cheapest is None:
                states[index] = (enter + run, None)
                continue
            moved = (before[cheapest][0] + enter + run, cheapest)
            if index in before:
                same = _device_of(candidate, block) == _device_of(candidate, block - 1)
                cross = 0.0 if same else min(LANE_S, enter)
                stayed = (before[index][0] + cross + run, index)
                states[index] = min(stayed, moved, key=lambda state: state[0])
            else:
                states[index] = moved
        if not states:
            return Missing(block)
        best.append(states)

    chosen: list[int] = []
    state: int | None = min(best[-1], key=lambda i: (best[-1][i][0], i))
    for states in reversed(best):
        if state is None:
            break  # only the first block's states have no predecessor
        chosen.append(state)
        state = states[state][1]
    chosen.reverse()
    return _merge(blocks, chosen, candidates)


def _merge(blocks: Span, chosen: list[int], candidates: tuple[Candidate, ...]) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    before: tuple[int, int | None] | None = None
    for block, index in zip(blocks, chosen, strict=True):
        candidate = candidates[index]
        place = (index, _device_of(candidate, block))
        if place == before:
            hops[-1] = Hop(candidate.node, candidate.endpoint, Span(hops[-1].span.first, block))
        else:
            hops.append(Hop(candidate.node, candidate.endpoint, Span(block, block)))
        before = place
    return tuple(hops)
