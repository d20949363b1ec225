"""From a snapshot to a route: the cheapest chain of spans that covers every block. Pure functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torrentlm.records import Endpoint, NodeKey, Span
from torrentlm.route.registry import Candidate, Snapshot

UNMEASURED_RTT_S = 0.050
UNMEASURED_BLOCK_S = 0.002
SUSPECT_PENALTY_S = 10.0
LOAD_PENALTY_S = 1.0
"""For a block that its holder would have to load first: more than any detour, less than asking somebody who failed."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One holder's part of a route."""

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


def _costs(candidate: Candidate) -> tuple[float, float]:
    """Seconds to enter this holder, and seconds per block once there."""
    rtt = UNMEASURED_RTT_S if candidate.rtt_s is None else candidate.rtt_s
    block = UNMEASURED_BLOCK_S if candidate.block_s is None else candidate.block_s
    return rtt / 2 + SUSPECT_PENALTY_S * candidate.suspect, block * (1 + candidate.sessions)


def plan_route(snapshot: Snapshot, blocks: Span, adapted: Collection[int] = ()) -> tuple[Hop, ...] | Missing:
    """The route through ``blocks`` with the lowest expected seconds per token, or the first block that keeps it from
    existing.

    ``adapted`` are the blocks that the session's adapter changes: only holders that apply adapters come in for them.

    A shortest path over (block, holder) states: staying with a holder costs its time per block, changing to one costs
    half its round trip more. Changing is always from the cheapest state of the block before, so the work is blocks ×
    candidates. Ties go to the smaller node key, so that equal snapshots give equal routes.
    """
    candidates = snapshot.candidates
    entry = [_costs(candidate) for candidate in candidates]
    best: list[dict[int, tuple[float, int | None]]] = []
    for block in blocks:
        states: dict[int, tuple[float, int | None]] = {}
        before = best[-1] if best else None
        cheapest = min(before, key=lambda i: (before[i][0], i)) if before else None
        for index, candidate in enumerate(candidates):
            load = _load_cost(candidate, block)
            if load is None or (block in adapted and not candidate.adapters):
                continue
            enter, run = entry[index][0], entry[index][1] + load
            if before is None or cheapest is None:
                states[index] = (enter + run, None)
                continue
            moved = (before[cheapest][0] + enter + run, cheapest)
            stayed = (before[index][0] + run, index) if index in before else moved
            states[index] = min(stayed, moved, key=lambda state: state[0])
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
    for block, index in zip(blocks, chosen, strict=True):
        candidate = candidates[index]
        if hops and hops[-1].node == candidate.node:
            hops[-1] = Hop(candidate.node, candidate.endpoint, Span(hops[-1].span.first, block))
        else:
            hops.append(Hop(candidate.node, candidate.endpoint, Span(block, block)))
    return tuple(hops)
