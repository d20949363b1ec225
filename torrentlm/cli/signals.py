"""Signals that end a program, for those who have children to take along."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Run the block whole: a signal that would end this process takes effect after it."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, remember) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def exit_on(number: int, frame: FrameType | None) -> None:
    """A handler that ends this process as an exception does: every ``with`` and ``finally`` is left on the way."""
    raise SystemExit(128 + number)
