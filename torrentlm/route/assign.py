"""From what the swarm holds to the span that a joining holder should take, and its devices' shares. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

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


SLABS = 2
"""What a device keeps for blocks that stay in RAM, each as large as the largest of them: one computes out of the first
while another one's bytes come into the second."""

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


def extended(
    span: Span,
    sizes: Sequence[Files],
    copies: Sequence[int],
    budget: int,
    *,
    missing: Sequence[Files] | None = None,
    room: int = 0,
) -> Span:
    """``span`` with as many blocks on both sides of it as ``budget`` and ``room`` hold (as ``choose_span`` has them),
    one after the other, first the one that has fewer copies."""
    absent = [{}] * len(sizes) if missing is None else missing
    total, fetched = _Total(), _Total()
    first, last = span.first, span.last
    for block in span:
        total.add(sizes[block])
        fetched.add(absent[block])
    while True:
        beside = [block for block in (first - 1, last + 1) if 0 <= block < len(sizes)]
        for block in sorted(beside, key=lambda block: copies[block]):
            total.add(sizes[block])
            fetched.add(absent[block])
            if total.bytes <= budget and fetched.bytes <= max(0, room):
                first, last = min(first, block), max(last, block)
                break
            total.remove(sizes[block])
            fetched.remove(absent[block])
        else:
            return Span(first, last)


def set_aside(sizes: Sequence[Files], may: Mapping[int, int], budget: int, ram: int) -> tuple[int, ...] | None:
    """Which blocks of a device's part stay in RAM, so that the others fit its ``budget`` beside the slabs: as few as
    will do, taken from the back, which leaves routes long runs of either kind.

    ``may`` says which blocks of ``sizes`` may, and the bytes that each takes then. () where all fits anyway, None where
    nothing helps.
    """
    total = _Total()
    for files in sizes:
        total.add(files)
    if total.bytes <= budget:
        return ()
    aside: list[int] = []
    taken = largest = 0
    for block in sorted(may, reverse=True):
        aside.append(block)
        total.remove(sizes[block])
        taken, largest = taken + may[block], max(largest, may[block])
        if taken > ram:
            return None
        if total.bytes + SLABS * largest <= budget:
            return tuple(reversed(aside))
    return None


def beyond(budget: int, ram: int, largest: int) -> int:
    """Bytes of blocks that a device with ``budget`` holds together with ``ram``, the largest being ``largest``."""
    return budget + max(0, ram - SLABS * largest)


def divide(sizes: Sequence[Files], budgets: Sequence[int], helping: Collection[int] = ()) -> tuple[range, ...]:
    """Consecutive blocks over the devices of one node: which of ``sizes`` each of ``budgets`` gets, in both orders.

    The division whose fullest device, in parts of its budget, is the least full. Of those, the one that fills the
    devices from the front, so that a route crosses as few of them as may be; the last may get nothing. A file counts
    once on each device that needs it. ``helping`` are the places of devices that get only what the others have no room
    for, since they are so much slower.
    """
    alone = [0 if at in helping else budget for at, budget in enumerate(budgets)]
    if helping and fits(sizes, alone):
        budgets, helping = alone, ()

    def filled(full: float) -> tuple[range, ...] | None:
        parts = (full if at in helping or not helping else max(1.0, full) for at in range(len(budgets)))
        return _filled(sizes, [part * budget for part, budget in zip(parts, budgets, strict=True)])

    low, full = 0.0, 1.0
    while (chosen := filled(full)) is None:
        low, full = full, 2 * full
        if full > _ENDLESS:  # no budget at all, so that no division is better than another
            return (range(len(sizes)), *(range(len(sizes), len(sizes)) for _ in budgets[1:]))
    for _ in range(_HALVINGS):
        middle = (low + full) / 2
        found = filled(middle)
        if found is None:
            low = middle
        else:
            full, chosen = middle, found
    return chosen


_HALVINGS = 50
_ENDLESS = 2.0**64


def fits(sizes: Sequence[Files], budgets: Sequence[int]) -> bool:
    """Whether consecutive blocks can be divided over these devices (``divide``) within all their budgets."""
    return _filled(sizes, budgets) is not None


def _filled(sizes: Sequence[Files], limits: Sequence[float]) -> tuple[range, ...] | None:
    """Each device gets as many of the blocks left as its limit in bytes allows; None if some are left in the end."""
    parts = []
    first = 0
    for limit in limits:
        total, last = _Total(), first
        while last < len(sizes):
            total.add(sizes[last])
            if total.bytes > limit:
                break
            last += 1
        parts.append(range(first, last))
        first = last
    return tuple(parts) if first == len(sizes) else None
