"""Which block files leave the disk so that others fit: a decision about plain values.

Files that are pinned, on their way or wanted stay; of the others, those that were not used for the longest time go
first, and none that need not. The state of a file::

    absent ─▶ on its way (promised its whole size) ─▶ complete ─▶ evicted
                                                        │  ▲
                                                        ▼  │
                                                       pinned
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """A block file in the folder, or on its way there. Bytes: ``taken`` on the disk now, ``whole`` when it is complete.

    ``used`` in seconds since some epoch. ``pinned``: it must stay.
    """

    taken: int
    whole: int
    used: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Eviction:
    """The names of files to remove, longest unused first; empty when there is room."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Even without ``evictable`` there is no room. Bytes: ``missing`` of what is wanted, ``staying`` in all that stays.

    ``enough`` is the smallest budget that would do, None if the budget does; ``short`` is what the disk lacks, 0 if it
    does not.
    """

    missing: int
    staying: int
    enough: int | None
    short: int
    evictable: tuple[str, ...]


def plan(wanted: Mapping[str, int], kept: Mapping[str, Kept], budget: int | None, free: int) -> Eviction | Refusal:
    """What must go so that the ``wanted`` files (name: whole size in bytes) can come.

    Afterwards everything that is complete or on its way takes at most ``budget`` bytes (None: no limit), and what is
    still to come at most the ``free`` bytes of the disk. What is all here already is never refused: a budget that was
    lowered below what is pinned keeps other files out, and that is all.
    """
    after = dict(kept)
    for name, size in wanted.items():
        known = kept.get(name)
        after[name] = Kept(min(known.taken, size) if known else 0, size, known.used if known else 0.0, pinned=True)
    whole = sum(file.whole for file in after.values())
    to_come = sum(file.whole - file.taken for file in after.values())
    needed = max(0, to_come - free, 0 if budget is None else whole - budget)
    unpinned = sorted(
        (name for name, file in after.items() if not file.pinned), key=lambda name: (after[name].used, name)
    )
    evictable = sum(after[name].taken for name in unpinned)
    missing = sum(after[name].whole - after[name].taken for name in wanted)
    if needed <= evictable:
        return Eviction(_fewest(unpinned, after, needed))
    if not missing:
        return Eviction(tuple(unpinned))
    staying = whole - evictable - missing
    enough = whole - evictable if budget is not None and whole - evictable > budget else None
    return Refusal(missing, staying, enough, max(0, to_come - free - evictable), tuple(unpinned))


def _fewest(oldest_first: list[str], files: Mapping[str, Kept], needed: int) -> tuple[str, ...]:
    """The longest unused files that make up ``needed`` bytes, without those that the others make unnecessary."""
    chosen: list[str] = []
    freed = 0
    for name in oldest_first:
        if freed >= needed:
            break
        chosen.append(name)
        freed += files[name].taken
    for name in reversed(chosen[:-1]):
        if freed - files[name].taken >= needed:
            chosen.remove(name)
            freed -= files[name].taken
    return tuple(chosen)
