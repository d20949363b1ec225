"""What waits to be written to the network, and where frames may go in between. No I/O.

Chunks read from the client almost always end inside a piece. An unfinished message is therefore held back until the
rest has come, so that a frame never waits for the client; only messages longer than ``HOLD_BYTES`` are let out in
parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torrentlm.wire.peerwire import Kind, Part

Buffers = list[bytes | memoryview]

HOLD_BYTES = 48 << 10


class Outbox:
    """Messages of the client in order, and before them, between two messages, whatever ``frames`` gives.

    ``frames(budget)`` returns ready BEP 10 messages of about ``budget`` bytes in all. ``waiting`` counts the client's
    bytes.
    """

    def __init__(self, frames: Callable[[int], Buffers]) -> None:
        self._frames = frames
        self._parts: deque[Part] = deque()
        self._open_parts = self._open_bytes = 0  # at the end of _parts, of a message that is not finished
        self._between: list[Part] = []  # what goes behind the message that is not finished
        self._unfinished = False
        self._offer: Part | None = None
        self._offered = False
        self.midway = False
        """The last byte handed out lies inside a message of the client."""
        self.waiting = 0

    def put(self, part: Part, *, offers: bool = False) -> None:
        """Add a RUN, or an OPEN whose message goes on in the next part.

        No frame leaves before the part that ``offers`` them.
        """
        self._parts.append(part)
        if offers:
            self._offer = part
        size = len(part.data)
        self.waiting += size
        if part.kind is Kind.OPEN:
            self._unfinished = True
            self._open_parts += 1
            self._open_bytes += size
            return
        self._open_parts = self._open_bytes = 0
        self._unfinished = False
        between, self._between = self._between, []
        for message in between:
            self.put(message)

    def put_between(self, message: Part) -> None:
        """Add a whole message that is not the client's, behind the one that the client is sending."""
        if self._unfinished:
            self._between.append(message)
        else:
            self.put(message)

    def next_batch(self, limit: int) -> Buffers:
        """What to write next: a message begun before, frames, then whole messages of about ``limit`` bytes."""
        batch: Buffers = []
        if self.midway:
            self._take_runs(batch, 0)
            if self.midway:
                return batch
        if self._offered:
            batch += self._frames(limit)
        self._take_runs(batch, limit)
        return batch

    def _take_runs(self, batch: Buffers, limit: int) -> None:
        """Take parts until ``limit`` bytes and the end of a message, or as far as may be let out."""
        parts, size = self._parts, 0
        while parts and (size < limit or self.midway):
            if len(parts) <= self._open_parts and not self.midway and self._open_bytes < HOLD_BYTES:
                return
            part = parts.popleft()
            self._offered = self._offered or part is self._offer
            batch.append(part.data)
            size += len(part.data)
            self.waiting -= len(part.data)
            self.midway = part.kind is Kind.OPEN
        self._open_parts = min(self._open_parts, len(parts))

    def clear(self) -> None:
        """Forget what the client wanted to say. Precondition: not ``midway``."""
        self._parts.clear()
        self._between.clear()
        self._unfinished = False
        self._open_parts = self._open_bytes = self.waiting = 0
