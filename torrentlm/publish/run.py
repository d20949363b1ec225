"""The light end of publishing: what an earlier run published is recognised without torch, which takes seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from torrentlm.compute.threads import first_import
from torrentlm.config import Recipe
from torrentlm.publish.consume import consume, finish_consuming
from torrentlm.publish.published import Progress, Published, recognise
from torrentlm.swarm.store import Store

WINDOW_S = 5.0
"""The rate is that of the last so many seconds."""
ENOUGH_S = 0.5
"""Over less than this a rate says nothing."""
EVENT_EVERY_S = 0.1


def run(recipe: Recipe, store: Store, progress: Progress, allow_code: Collection[str] = ()) -> Published:
    """Publish ``recipe`` into ``store``, or recognise what is published, and remove its source if that is asked for.

    Blocks, and raises as ``publish`` does.
    """
    finish_consuming(recipe, store)
    published = recognise(recipe, store)
    if published is None:
        with first_import():
            from torrentlm.publish.publish import publish

        published = publish(recipe, store, progress, allow_code)
    if recipe.consume:
        consume(recipe, store, published)
    return published


class Pace:
    """Makes ``progress`` events (docs/cli.md) of what ``publish`` reports: rate and time left, not too many of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._total = 0
        self._said: tuple[float, str] = (float("-inf"), "")

    def __call__(self, done: int, total: int, what: str) -> dict[str, Any] | None:
        """The event for this moment, or None if it is worth none. ``rate`` in bytes per second, ``left_s`` in seconds;
        they are left out until there is something to tell them from.
        """
        now = self._clock()
        if total != self._total:
            self._total = total
            self._seen.clear()  # what was there before the work began is no speed
        self._seen.append((now, done))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        when, before = self._said
        if now - when < EVENT_EVERY_S and what == before and done != total:
            return None
        self._said = now, what
        event: dict[str, Any] = {"event": "progress", "what": f"publishing {what}", "done": done, "total": total}
        began, first = self._seen[0]
        if now - began >= ENOUGH_S and done > first:
            rate = (done - first) / (now - began)
            event |= {"rate": rate, "left_s": (total - done) / rate}
        return event


def published_event(published: Published) -> dict[str, Any]:
    """The ``published`` event of docs/cli.md."""
    return {
        "event": "published",
        "name": published.manifest.name,
        "magnet": str(published.magnet),
        "size": published.manifest.size,
        "left_out": list(published.left_out),
        "proof": None if published.sidecar is None else published.sidecar.described(),
    }
