"""From what the swarm holds to the span that a joining holder should take. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from torrentlm.records import Span
from torrentlm.route.registry import Snapshot


def copies(snapshot: Snapshot, blocks: int) -> list[int]:
    """How many peers serve, or are fetching in order to serve, each block."""
    counts = [0] * blocks
    for candidate in snapshot.candidates:
        for block in {block for span in (*candidate.resident, *candidate.claimed) for block in span if block < blocks}:
            counts[block] += 1
    return counts


def choose_span(
    sizes: Sequence[int], copies: Sequence[int], budget: int, *, missing: Sequence[int] | None = None, room: int = 0
) -> Span | None:
    """The span within ``budget`` bytes that the swarm lacks most; None if not even one block fits.

    A block with c copies is worth 1 / (1 + c)²: the first copy of anything outweighs second copies of three other
    blocks. Ties go to the longer span, then to the one further to the front. ``missing`` are the bytes of each block
    that are not on the disk yet, if the span is to fit into ``room`` bytes there too.
    """
    absent = [0] * len(sizes) if missing is None else missing
    best: tuple[float, int, int] | None = None
    choice: Span | None = None
    first = total = fetched = 0
    for last, size in enumerate(sizes):
        total += size
        fetched += absent[last]
        while first <= last and (total > budget or fetched > max(0, room)):
            total -= sizes[first]
            fetched -= absent[first]
            first += 1
        if first > last:
            continue
        worth = sum(1 / (1 + copies[block]) ** 2 for block in range(first, last + 1))
        key = (round(worth, 9), last - first + 1, -first)
        if best is None or key > best:
            best, choice = key, Span(first, last)
    return choice
