"""From what the swarm holds to the span that a joining holder should take. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torrentlm.records import Span
from torrentlm.route.registry import Snapshot


def copies(snapshot: Snapshot, blocks: int) -> list[int]:
    """How many peers serve, or are fetching in order to serve, each block."""
    counts = [0] * blocks
    for candidate in snapshot.candidates:
        for block in {
            block
            for span in (*candidate.resident, *candidate.offered, *candidate.claimed)
            for block in span
            if block < blocks
        }:
            counts[block] += 1
    return counts


Files = Mapping[str, int]
"""A block's files: bytes by name. One that several blocks name is there once."""


class _Total:
    """The bytes of the files of some blocks, each file counted once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._users: Counter[str] = Counter()

    def add(self, files: Files) -> None:
        self.bytes += sum(size for name, size in files.items() if not self._users[name])
        self._users.update(files.keys())

    def remove(self, files: Files) -> None:
        self._users.subtract(files.keys())
        self.bytes -= sum(size for name, size in files.items() if not self._users[name])


def choose_span(
    sizes: Sequence[Files],
    copies: Sequence[int],
    budget: int,
    *,
    missing: Sequence[Files] | None = None,
    room: int = 0,
) -> Span | None:
    """The span within ``budget`` bytes that the swarm lacks most; None if not even one block fits.

    A block with c copies is worth 1 / (1 + c)²: the first copy of anything outweighs second copies of three other
    blocks. Ties go to the longer span, then to the one further to the front. ``missing`` are the bytes of each block
    that are not on the disk yet, if the span is to fit into ``room`` bytes there too.
    """
    absent = [{}] * len(sizes) if missing is None else missing
    best: tuple[float, int, int] | None = None
    choice: Span | None = None
    first = 0
    total, fetched = _Total(), _Total()
    for last, size in enumerate(sizes):
        total.add(size)
        fetched.add(absent[last])
        while first <= last and (total.bytes > budget or fetched.bytes > max(0, room)):
            total.remove(sizes[first])
            fetched.remove(absent[first])
            first += 1
        if first > last:
            continue
        worth = sum(1 / (1 + copies[block]) ** 2 for block in range(first, last + 1))
        key = (round(worth, 9), last - first + 1, -first)
        if best is None or key > best:
            best, choice = key, Span(first, last)
    return choice
