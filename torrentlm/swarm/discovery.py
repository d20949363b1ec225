"""Which endpoints to try, and when: merged from every source, with patience for the dead. Pure; the time is passed in.

An endpoint is tried from ``due`` to ``met`` or ``failed``, and due again after a pause: a short one if it answered (its
connection may have ended since), one that doubles if it did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from torrentlm.records import Endpoint

MAX_ENDPOINTS = 1000
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0
ANSWERED_PAUSE_S = 30.0
TRY_LIMIT_S = 60.0
"""A try that nobody reported on within this time counts as failed."""
FORGET_AFTER_FAILURES = 6


class Source(IntEnum):
    """Where an endpoint is known from; the lower, the sooner it is tried."""

    MAGNET = 0
    STATIC = 1
    LAST_SESSION = 2
    GOSSIP = 3
    DHT = 4

    @property
    def trusted(self) -> bool:
        """Given by the user or earned before: never forgotten, however often it fails."""
        return self <= Source.LAST_SESSION


@dataclass(slots=True)
class _Candidate:
    source: Source
    failures: int = 0
    due: float = -math.inf
    answered: float = -math.inf


class Discovery:
    """The endpoints known for one model. ``own`` says of an endpoint whether this node itself listens there."""

    def __init__(self, own: Callable[[Endpoint], bool]) -> None:
        self._own = own
        self._candidates: dict[Endpoint, _Candidate] = {}

    def add(self, endpoint: Endpoint, source: Source) -> bool:
        """Take in an endpoint; True if it is news. Our own are not taken, nor more than ``MAX_ENDPOINTS``."""
        if known := self._candidates.get(endpoint):
            known.source = min(known.source, source)
            return False
        if self._own(endpoint) or not self._make_room(source):
            return False
        self._candidates[endpoint] = _Candidate(source)
        return True

    def due(self, now: float, limit: int) -> list[Endpoint]:
        """The next ``limit`` endpoints to try now, best source first; report each by ``met`` or ``failed``."""
        ready = [endpoint for endpoint, candidate in self._known() if candidate.due <= now]
        chosen = sorted(ready, key=lambda endpoint: self._candidates[endpoint].source)[:limit]
        for endpoint in chosen:
            self._candidates[endpoint].due = now + TRY_LIMIT_S
        return chosen

    def met(self, endpoint: Endpoint, now: float) -> None:
        """It answered, whether we dialled it or it dialled us."""
        self.add(endpoint, Source.GOSSIP)
        if candidate := self._candidates.get(endpoint):
            candidate.failures = 0
            candidate.answered = now
            candidate.due = now + ANSWERED_PAUSE_S

    def failed(self, endpoint: Endpoint, now: float) -> None:
        """It did not answer: try less and less often; forget it in the end if only strangers named it."""
        candidate = self._candidates.get(endpoint)
        if candidate is None:
            return
        candidate.failures += 1
        candidate.due = now + min(FIRST_PAUSE_S * 2 ** (candidate.failures - 1), LONGEST_PAUSE_S)
        if candidate.failures >= FORGET_AFTER_FAILURES and not candidate.source.trusted:
            del self._candidates[endpoint]

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All that are known: those that answer first, then by source."""
        known = sorted(self._known(), key=lambda item: (item[1].failures, item[1].source, -item[1].answered))
        return tuple(endpoint for endpoint, _ in known)

    def answered(self) -> tuple[Endpoint, ...]:
        """Those that answered and have not failed since, the latest first."""
        known = [(candidate.answered, endpoint) for endpoint, candidate in self._known() if not candidate.failures]
        return tuple(endpoint for at, endpoint in sorted(known, reverse=True) if at > -math.inf)

    def _known(self) -> list[tuple[Endpoint, _Candidate]]:
        """Own addresses may turn out to be ours only after they were taken in."""
        return [item for item in self._candidates.items() if not self._own(item[0])]

    def _make_room(self, source: Source) -> bool:
        """Whether there is room, if need be for the worst of what only strangers named."""
        if len(self._candidates) < MAX_ENDPOINTS:
            return True
        worst = max(self._candidates, key=lambda endpoint: self._rank(self._candidates[endpoint]))
        if self._candidates[worst].failures == 0 and self._candidates[worst].source <= source:
            return False
        del self._candidates[worst]
        return True

    @staticmethod
    def _rank(candidate: _Candidate) -> tuple[bool, bool, int, int]:
        return not candidate.source.trusted, candidate.failures > 0, candidate.source, candidate.failures
