"""What to fetch before anybody asks for it, and what of that to give up again. Pure: no I/O, time is passed in.

Blocks are wanted in this order; within a reason, those of the higher score first:

1. **route**: what routes seen a moment ago need next: the rest of the span asked for, and the blocks behind it
2. **adjacent**: the blocks on both sides of the span that this node holds, the nearest first
3. **expected**: what the requests seen so far make likely (``requests.Requests``), from a probability on
4. **rare**: blocks with few copies in the swarm, those with the fewest first

The same order says what a block is worth that is here already. What is fetched displaces only what is worth less: a
lower reason, or under the same reason at most half the score, so that two equals do not chase each other out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torrentlm.records import Span
from torrentlm.route.assign import Files
from torrentlm.route.requests import Ask, Requests

AHEAD = 8
"""Blocks behind a route seen, and on each side of the span held, that are wanted."""
LIKELY = 0.02
"""From this probability on a block is expected."""
ENOUGH_COPIES = 3
"""A block that so many others have is not rare."""
CLEARLY = 2.0
"""By this factor a score must be higher to displace one under the same reason."""


class Reason(IntEnum):
    """Why a block is wanted; the higher comes first."""

    NONE = 0
    RARE = 1
    EXPECTED = 2
    ADJACENT = 3
    ROUTE = 4


class Worth(NamedTuple):
    """``score`` compares blocks under the same reason; above 0 wherever there is a reason."""

    reason: Reason = Reason.NONE
    score: float = 0.0

    def clearly_above(self, other: Worth) -> bool:
        if self.reason != other.reason:
            return self.reason > other.reason
        return self.score > 0 and self.score >= CLEARLY * other.score


@dataclass(frozen=True, slots=True)
class View:
    """One model as this node sees it: each block's files, the span held, and how many *others* have each block."""

    files: Sequence[Files]
    span: Span | None
    copies: Sequence[int]


@dataclass(frozen=True, slots=True)
class Limits:
    """``room``: bytes that prefetched files may still take. ``rate``: bytes per second that prefetching may take.

    A plan ends with the block that reaches what ``rate`` brings in ``horizon_s`` seconds: what comes later is decided
    when more is known.
    """

    room: int
    rate: int
    horizon_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fetch ``files`` (``size`` bytes, what is missing of the block) once ``displaces`` is off the disk."""

    model: bytes
    block: int
    files: tuple[str, ...]
    size: int
    worth: Worth
    displaces: tuple[str, ...] = ()


Block = tuple[bytes, int]


def worths(models: Mapping[bytes, View], requests: Requests, now: float) -> dict[Block, Worth]:
    """What each block is worth that there is any reason for; the highest reason counts."""
    found: dict[Block, Worth] = {}

    def want(model: bytes, block: int, reason: Reason, score: float) -> None:
        if 0 <= block < len(models[model].files):
            found[model, block] = max(found.get((model, block), Worth()), Worth(reason, score))

    for model, view in models.items():
        for block, copies in enumerate(view.copies):
            if copies < ENOUGH_COPIES:
                want(model, block, Reason.RARE, 1 / (1 + copies) ** 2)
        if view.span is not None:
            for distance in range(1, AHEAD + 1):
                for block in (view.span.last + distance, view.span.first - distance):
                    want(model, block, Reason.ADJACENT, 1 / distance)
    for (model, block), chance in _expected(requests, models).items():
        if chance >= LIKELY:
            want(model, block, Reason.EXPECTED, chance)
    for age, (model, span) in enumerate(requests.routes(now)):
        if model in models:
            for place, block in enumerate(range(span.first, span.last + 1 + AHEAD)):
                want(model, block, Reason.ROUTE, 1 / (1 + age) + 1e-3 / (1 + place))
    return found


def _expected(requests: Requests, models: Mapping[bytes, View]) -> dict[Block, float]:
    """The chance of each block: of all that may be asked for next, added up."""
    chances: dict[Block, float] = {}
    for (model, span), chance in requests.expected().items():
        if model in models:
            for block in span:
                chances[model, block] = chances.get((model, block), 0.0) + chance
    return chances


def plan(
    models: Mapping[bytes, View],
    requests: Requests,
    here: Collection[str],
    displaceable: Sequence[str],
    limits: Limits,
    now: float,
) -> list[Fetch]:
    """What to fetch, in this order. ``here`` are the names of files on disk or on their way.

    ``displaceable`` are those of them that may go for something better, the longest unused first; nothing else is ever
    displaced. Each fetch fits into ``limits.room`` and what the fetches up to it displace.
    """
    found = worths(models, requests, now)
    sizes = {name: size for view in models.values() for files in view.files for name, size in files.items()}
    of_file: dict[str, Worth] = {}
    for (model, block), worth in found.items():
        for name in models[model].files[block]:
            of_file[name] = max(of_file.get(name, Worth()), worth)
    spare = sorted((name for name in displaceable if name in here), key=lambda name: of_file.get(name, Worth()))
    taken, left, fetches, total = set(here), limits.room, list[Fetch](), 0
    for model, block in sorted(found, key=lambda block: (found[block], -block[1]), reverse=True):
        if total >= limits.rate * limits.horizon_s:
            break
        missing = {name: size for name, size in models[model].files[block].items() if name not in taken}
        size = sum(missing.values())
        if not missing:
            continue
        out = _make_room(size - left, spare, sizes, of_file, found[model, block])
        if out is None:
            continue
        spare = spare[len(out) :]
        left += sum(sizes.get(name, 0) for name in out) - size
        total += size
        taken |= missing.keys()
        fetches.append(Fetch(model, block, tuple(missing), size, found[model, block], out))
    return fetches


def _make_room(
    lacking: int, spare: Sequence[str], sizes: Files, of_file: Mapping[str, Worth], worth: Worth
) -> tuple[str, ...] | None:
    """The least worthy of ``spare`` that make ``lacking`` bytes; None if that would take one that is not worth less."""
    out: list[str] = []
    for name in spare:
        if lacking <= 0:
            break
        if not worth.clearly_above(of_file.get(name, Worth())):
            return None
        out.append(name)
        lacking -= sizes.get(name, 0)
    return tuple(out) if lacking <= 0 else None
