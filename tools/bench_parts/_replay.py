"""One disk, one link, one trace: how many of the blocks asked for are there already."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from _trace import MODELS, Walk

from torrentlm.route.prefetch import Fetch, Limits, View, in_use, plan
from torrentlm.route.requests import ROUTE_S, Ask, Requests

STEP_S = 0.05
"""What a block takes to compute, at the pace of a prompt."""
GENERATION_S = 20.0
"""What a session takes after its prompt; the link is free meanwhile."""
PLANNED = 6
"""Blocks that are planned at a time."""
SHARE = 0.25
"""Of the link's rate, for what is prefetched; what is asked for has all of it, and then nothing is prefetched."""


class Blind(Requests):
    """Sees routes, expects nothing: what is left is adjacency."""

    def expected(self) -> dict[Ask, float]:
        return {}


@dataclass(slots=True)
class Outcome:
    """``hits`` of ``asked`` blocks were there; ``fetched`` came over the link; ``waited_s`` for the others."""

    asked: int = 0
    hits: int = 0
    fetched: int = 0
    waited_s: float = 0.0


_VIEWS = {
    bytes([model]): View(
        files=[{f"{model}:{block}": 1} for block in range(blocks)],
        spans=(),
        copies=[99] * blocks,  # what the swarm lacks is no matter of this node's own hits
    )
    for model, blocks in enumerate(MODELS)
}


class Replay:
    """An LRU of ``capacity`` blocks that are fetched in ``fetch_s`` seconds each; ``requests`` None: no prefetching."""

    def __init__(self, requests: Requests | None, capacity: int, fetch_s: float) -> None:
        self.outcome = Outcome()
        self._requests = requests
        self._capacity = capacity
        self._fetch_s = fetch_s
        self._cached: OrderedDict[str, None] = OrderedDict()
        self._planned: deque[Fetch] = deque()
        self._stale = True  # something has changed since the plan was made
        self._spent = False  # the plan had something
        self._coming: str | None = None
        self._missing_s = 0.0  # of what is coming, at the full rate
        self._now = 0.0
        self._saw = 0.0

    def run(self, walks: Sequence[Walk]) -> Outcome:
        for walk in walks:
            self._idle(walk.gap_s)
            for hop in walk.hops:
                self._saw = self._now
                self._stale = True
                if self._requests is not None:
                    self._requests.saw(bytes([walk.model]), hop, self._now)
                for block in hop:
                    self._ask(f"{walk.model}:{block}")
                self._idle(STEP_S * len(hop))
            self._idle(GENERATION_S)
        return self.outcome

    def _ask(self, name: str) -> None:
        self.outcome.asked += 1
        if name in self._cached:
            self.outcome.hits += 1
            self._cached.move_to_end(name)
            return
        took = self._fetch_s
        if name == self._coming:
            took, self._coming = self._missing_s, None
        else:
            self.outcome.fetched += 1
        self._stale = True
        self.outcome.waited_s += took
        self._now += took
        self._keep(name)

    def _keep(self, name: str) -> None:
        while len(self._cached) + (self._coming is not None) >= self._capacity:
            self._cached.popitem(last=False)
        self._cached[name] = None

    def _idle(self, seconds: float) -> None:
        """The link has nothing else to do: prefetch."""
        end = self._now + seconds
        while self._now < end:
            if self._coming is None and not self._choose():
                changes = self._saw + ROUTE_S + 1e-3  # when the route is over
                self._stale = self._stale or self._now < changes <= end
                self._now = changes if self._now < changes <= end else end
                continue
            spent = min(end - self._now, self._missing_s / SHARE)
            self._now += spent
            self._missing_s -= spent * SHARE
            if self._missing_s <= 1e-9:
                name, self._coming = self._coming, None
                self._keep(str(name))
        self._now = end

    def _choose(self) -> bool:
        """Begin what comes next; a plan holds until something is asked for or its routes are over."""
        if self._requests is None:
            return False
        if self._stale:
            for name in in_use(_VIEWS, self._requests, self._cached.keys(), self._now):
                self._cached.move_to_end(name)
        if self._stale or (self._spent and not self._planned):
            limits = Limits(self._capacity - len(self._cached), 1, PLANNED)
            self._planned = deque(plan(_VIEWS, self._requests, self._cached, list(self._cached), limits, self._now))
            self._stale, self._spent = False, bool(self._planned)
        if not self._planned:
            return False
        chosen = self._planned.popleft()
        for gone in chosen.displaces:
            del self._cached[gone]
        (self._coming,) = chosen.files
        self._missing_s = self._fetch_s
        self.outcome.fetched += 1
        return True
