"""What sessions asked this node for, and what they will probably ask for next. State without I/O and without a clock.

A first-order Markov model: how often each request (a span of a model) followed which other, every count halved each
``HALF_LIFE_S``. What follows a request that was rarely seen is taken from what is asked for at all. Of several requests
ahead, later ones count less. Memory is bounded: of requests, and of followers of each, the most frequent are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from torrentlm.records import Span

Ask = tuple[bytes, Span]
"""A request: the model's v2 info-hash, and the blocks that a session wants of it."""

HALF_LIFE_S = 8 * 3600.0
"""Popularity changes with the hours, and takes hours to be known; docs/prefetch.md compares."""
MAX_ASKS = 64
MAX_FOLLOWERS = 16
MAX_ROUTES = 8
ROUTE_S = 60.0
"""For so long a request is a route in use: the default lease of a session."""
BACKOFF = 2.0
"""So many observed followers weigh as much as what is asked for at all."""
STEPS = 24
"""Requests that are looked ahead."""
LATER = 0.93
"""What each step further ahead counts, against the one before."""


class Requests:
    """The one owner of what is known about requests. Times in seconds of any monotonic clock, never going back."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, backoff: float = BACKOFF) -> None:
        self._half_life_s = half_life_s
        self._backoff = backoff
        self._asked: dict[Ask, float] = {}
        self._followed: dict[Ask, dict[Ask, float]] = {}
        self._routes: deque[tuple[Ask, float]] = deque(maxlen=MAX_ROUTES)
        self._last: Ask | None = None
        self._at = 0.0
        self._shares: dict[Ask, float] | None = {}

    def saw(self, model: bytes, span: Span, now: float) -> None:
        """A session asked for ``span`` of ``model``."""
        self._decay(now)
        ask = (model, span)
        if self._last is not None and self._last in self._asked:
            _count(self._followed.setdefault(self._last, {}), ask, MAX_FOLLOWERS)
        _count(self._asked, ask, MAX_ASKS)
        for gone in self._followed.keys() - self._asked.keys():
            del self._followed[gone]
        self._last = ask
        self._shares = None
        self._routes = deque((route for route in self._routes if route[0] != ask), MAX_ROUTES)
        self._routes.append((ask, now))

    def routes(self, now: float) -> list[Ask]:
        """What was asked for within ``ROUTE_S``, the latest first."""
        return [ask for ask, at in reversed(self._routes) if now - at <= ROUTE_S]

    def expected(self) -> dict[Ask, float]:
        """For each request its share of the next ones, the nearest weighing most; the shares add up to 1, if any.

        Time changes nothing here: all counts decay alike.
        """
        if self._shares is None:
            self._shares = self._look_ahead()
        return self._shares

    def _look_ahead(self) -> dict[Ask, float]:
        total = sum(self._asked.values())
        if self._last is None or total <= 0:
            return {}
        overall = {ask: seen / total for ask, seen in self._asked.items()}
        follows = {ask: self._chances(ask, overall) for ask in overall}
        state: Mapping[Ask, float] = {self._last: 1.0}
        shares = dict.fromkeys(overall, 0.0)
        weight = (1 - LATER) / (1 - LATER**STEPS)
        for _ in range(STEPS):
            ahead = dict.fromkeys(overall, 0.0)
            for ask, chance in state.items():
                for follower, share in follows[ask].items():
                    ahead[follower] += chance * share
            rest = max(0.0, 1.0 - sum(ahead.values()))
            state = {ask: chance + rest * overall[ask] for ask, chance in ahead.items()}
            for ask, chance in state.items():
                shares[ask] += weight * chance
            weight *= LATER
        return shares

    def _chances(self, ask: Ask, known: Mapping[Ask, float]) -> dict[Ask, float]:
        """What was seen to follow ``ask``; what is lacking to 1 is left to what is asked for at all."""
        followers = {other: seen for other, seen in self._followed.get(ask, {}).items() if other in known}
        seen = sum(followers.values()) + self._backoff
        return {other: times / seen for other, times in followers.items()}

    def _decay(self, now: float) -> None:
        factor = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._at = max(now, self._at)
        for counts in (self._asked, *self._followed.values()):
            for ask in counts:
                counts[ask] *= factor


def _count(counts: dict[Ask, float], ask: Ask, limit: int) -> None:
    """One more of ``ask``; if that makes too many, the least frequent of the others goes."""
    counts[ask] = counts.get(ask, 0.0) + 1.0
    if len(counts) > limit:
        del counts[min((other for other in counts if other != ask), key=counts.__getitem__)]
