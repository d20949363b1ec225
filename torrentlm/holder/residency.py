"""Which block files are in a device's memory: what to load and what to let go. Pure decisions, no I/O, no clock.

Files stand in the order of their last use, the least recently used first. What a session uses is pinned and stays; all
else may go. What a plan loads and what stays never exceed the budget together, so whoever carries it out lets go first
and loads then.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Resident:
    """A file in memory: its bytes there, and by how many sessions (or others who need it now) it is used."""

    bytes: int
    pins: int = 0


@dataclass(frozen=True, slots=True)
class Plan(Generic[Key]):
    """``evictions`` first, then ``loads``, in this order."""

    loads: tuple[Key, ...]
    evictions: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why there is no plan: the bytes of all that is wanted, those that others have pinned beside it, and the budget.

    ``hopeless``: it would not fit into the empty budget either.
    """

    wanted: int
    pinned: int
    budget: int

    @property
    def hopeless(self) -> bool:
        return self.wanted > self.budget


def plan(residents: Mapping[Key, Resident], wanted: Mapping[Key, int], budget: int) -> Plan[Key] | Shortage:
    """How to have all of ``wanted`` (bytes by key) in memory, within ``budget`` bytes.

    ``residents`` is ordered by last use. What is wanted and there already is not let go of.
    """
    here = {key: resident for key, resident in residents.items() if key not in wanted}
    needed = sum(residents[key].bytes if key in residents else size for key, size in wanted.items())
    pinned = sum(resident.bytes for resident in here.values() if resident.pins)
    if needed + pinned > budget:
        return Shortage(needed, pinned, budget)
    evictions = _least_recent(here, sum(resident.bytes for resident in here.values()) + needed - budget)
    return Plan(tuple(key for key in wanted if key not in residents), evictions)


def shrink(residents: Mapping[Key, Resident], surplus: int) -> tuple[Key, ...]:
    """What to let go of to be ``surplus`` bytes smaller, or as near to that as pins allow."""
    return _least_recent(residents, surplus)


def _least_recent(residents: Mapping[Key, Resident], surplus: int) -> tuple[Key, ...]:
    chosen = []
    for key, resident in residents.items():
        if surplus <= 0:
            break
        if not resident.pins:
            chosen.append(key)
            surplus -= resident.bytes
    return tuple(chosen)
