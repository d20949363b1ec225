"""A made-up day at a holder: which blocks of which models sessions ask for, seeded; and Belady's optimum for it."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torrentlm.records import Span

MODELS = (16, 20, 24, 24, 28, 32, 36, 40)
"""Blocks of each model."""
HOP = 8
"""A session asks for so many blocks at a time: one hop of its route."""
DAY_S = 86_400.0
DRIFT = 0.8
"""By how much a model's popularity swings around its mean within a day; each model has an hour of its own."""
GAP_S = 240.0
"""Mean time between two sessions."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A session: ``gap_s`` seconds after the one before, through all blocks of ``model``, hop by hop."""

    gap_s: float
    model: int
    hops: tuple[Span, ...]


def make_trace(seed: int, exponent: float, days: float, again: float) -> list[Walk]:
    """Models drawn by Zipf's law with ``exponent``; with the chance ``again``, it is the last session's model."""
    rng = random.Random(seed)
    ranks = rng.sample(range(len(MODELS)), len(MODELS))
    hours = [rng.random() for _ in MODELS]
    walks: list[Walk] = []
    now = 0.0
    while now < days * DAY_S:
        gap = rng.expovariate(1 / GAP_S)
        now += gap
        weights = [
            (1 + rank) ** -exponent * (1 + DRIFT * math.cos(2 * math.pi * (now / DAY_S + hour)))
            for rank, hour in zip(ranks, hours, strict=True)
        ]
        model = rng.choices(range(len(MODELS)), weights)[0]
        if walks and rng.random() < again:
            model = walks[-1].model
        blocks = MODELS[model]
        hops = tuple(Span(first, min(first + HOP, blocks) - 1) for first in range(0, blocks, HOP))
        walks.append(Walk(gap, model, hops))
    return walks


def belady(walks: Sequence[Walk], capacity: int) -> float:
    """The hit rate of whoever knows the future and fetches only what is asked for: the one used latest goes."""
    asked = [(walk.model, block) for walk in walks for hop in walk.hops for block in hop]
    following: dict[tuple[int, int], int] = {}
    again = [0] * len(asked)
    for place in range(len(asked) - 1, -1, -1):
        again[place] = following.get(asked[place], len(asked) + place)
        following[asked[place]] = place
    cached: dict[tuple[int, int], int] = {}
    latest: list[tuple[int, tuple[int, int]]] = []
    hits = 0
    for block, next_use in zip(asked, again, strict=True):
        hits += block in cached
        if block not in cached and len(cached) == capacity:
            while cached.get((gone := heapq.heappop(latest))[1]) != -gone[0]:
                pass
            del cached[gone[1]]
        cached[block] = next_use
        heapq.heappush(latest, (-next_use, block))
    return hits / len(asked)


def blocks_asked(walks: Sequence[Walk]) -> int:
    return sum(len(hop) for hop in itertools.chain.from_iterable(walk.hops for walk in walks))
