"""What to fetch before anybody asks for it, and what of that to give up again. Pure: no I/O, time is passed in.

Blocks are wanted in this order; within a reason, those of the higher score first:

1. **route**: what routes seen a moment ago need next: the rest of the span asked for, and the blocks behind it
2. **adjacent**: the blocks on both sides of the spans that this node holds, the nearest first
3. **expected**: what the requests seen so far make likely (``requests.Requests``), from a probability on
4. **rare**: blocks with few copies in the swarm, those with the fewest first

The same order says what a block is worth that is here already. What is fetched displaces only what is worth less: a
lower reason, or under the same reason at most a quarter of the score. Neither equals nor what is only counted a little
differently chase each other out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torrentlm.records import Span
from torrentlm.route.assign import Files
from torrentlm.route.registry import Snapshot
from torrentlm.route.requests import Requests

AHEAD = 8
"""Blocks behind a route seen, and on each side of a span held, that are wanted."""
LIKELY = 0.02
"""From this probability on a block is fetched because it is expected; 1 / CLEARLY of it keeps one that is here."""
ENOUGH_COPIES = 3
"""A block that so many others have is not rare."""
CLEARLY = 4.0
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
    """One model as this node sees it: each block's files, the spans held, and how many *others* have each block.

    ``first``: the block at which to begin among equals, so that not every node fetches the same one.
    """

    files: Sequence[Files]
    spans: Sequence[Span]
    copies: Sequence[int]
    first: int = 0


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
LEAST = {reason: Worth(reason, LIKELY if reason is Reason.EXPECTED else 0.0) for reason in Reason}
"""What a block must be worth to be fetched; what is here and worth a little less stays."""


def copies_of_others(snapshot: Snapshot, blocks: int) -> list[int]:
    """How many peers have each block on disk or serve it: whom it can be fetched from."""
    counts = [0] * blocks
    for candidate in snapshot.candidates:
        for block in {block for span in (*candidate.held, *candidate.resident) for block in span if block < blocks}:
            counts[block] += 1
    return counts


def worths(models: Mapping[bytes, View], requests: Requests, now: float) -> dict[Block, Worth]:
    """What each block is worth that there is any reason for; the highest reason counts."""
    found: dict[Block, Worth] = {}
    for block, worth in _reasons(models, requests, now):
        model, number = block
        if 0 <= number < len(models[model].files) and worth > found.get(block, Worth()):
            found[block] = worth
    return found


def _reasons(models: Mapping[bytes, View], requests: Requests, now: float) -> Iterator[tuple[Block, Worth]]:
    """Every reason for every block, some of which may not exist."""
    for model, view in models.items():
        for block, copies in enumerate(view.copies):
            if copies < ENOUGH_COPIES:
                yield (model, block), Worth(Reason.RARE, 1 / (1 + copies) ** 2)
        for span in view.spans:
            for distance in range(1, AHEAD + 1):
                yield (model, span.last + distance), Worth(Reason.ADJACENT, 1 / distance)
                yield (model, span.first - distance), Worth(Reason.ADJACENT, 1 / distance)
    for likely, chance in _expected(models, requests).items():
        if chance >= LIKELY / CLEARLY:
            yield likely, Worth(Reason.EXPECTED, chance)
    for age, (model, span) in enumerate(requests.routes(now)):
        if model in models:
            end = min(span.last + AHEAD, len(models[model].files) - 1)
            for place, number in enumerate(range(span.first, end + 1)):
                yield (model, number), Worth(Reason.ROUTE, 1 / (1 + age) + 1e-3 / (1 + place))


def _expected(models: Mapping[bytes, View], requests: Requests) -> dict[Block, float]:
    """The chance of each block: of all that may be asked for next, added up."""
    chances: dict[Block, float] = {}
    for (model, span), chance in requests.expected().items():
        if model in models:
            for number in range(span.first, min(span.last, len(models[model].files) - 1) + 1):
                chances[model, number] = chances.get((model, number), 0.0) + chance
    return chances


def plan(
    models: Mapping[bytes, View],
    requests: Requests,
    here: Collection[str],
    displaceable: Sequence[str],
    limits: Limits,
    now: float,
) -> list[Fetch]:
    """What to fetch, in this order; nothing that no peer has. ``here`` are the names of files on disk or on their way.

    ``displaceable`` are those of them that may go for something better, the longest unused first; nothing else is ever
    displaced. Each fetch fits into ``limits.room`` and what the fetches up to it displace.
    """
    found = worths(models, requests, now)
    sizes = {name: size for view in models.values() for files in view.files for name, size in files.items()}
    of_file: dict[str, Worth] = {}
    for (model, block), worth in found.items():
        for name in models[model].files[block]:
            of_file[name] = max(of_file.get(name, Worth()), worth)
    known = [name for name in displaceable if name in here and name in sizes]
    spare = sorted(known, key=lambda name: of_file.get(name, Worth()))
    taken, left, total = set(here), limits.room, 0
    fetches: list[Fetch] = []

    def order(block: Block) -> tuple[Worth, int]:
        view = models[block[0]]
        return found[block], -((block[1] - view.first) % len(view.files))

    for model, block in sorted(found, key=order, reverse=True):
        if total >= limits.rate * limits.horizon_s:
            break
        missing = {name: size for name, size in models[model].files[block].items() if name not in taken}
        if not missing or not models[model].copies[block] or found[model, block] < LEAST[found[model, block].reason]:
            continue
        size = sum(missing.values())
        out = _make_room(size - left, spare, sizes, of_file, found[model, block])
        if out is None:
            continue
        spare = spare[len(out) :]
        left += sum(sizes[name] for name in out) - size
        total += size
        taken |= missing.keys()
        fetches.append(Fetch(model, block, tuple(missing), size, found[model, block], out))
    return fetches


def in_use(models: Mapping[bytes, View], requests: Requests, here: Set[str], now: float) -> list[str]:
    """Files that are here and that a route needs or that are expected, the least of them first.

    They are to count as used now wherever the longest unused goes: what will be asked for is no better for having been
    fetched long ago.
    """
    of_file: dict[str, Worth] = {}
    for (model, block), worth in worths(models, requests, now).items():
        if worth.reason in (Reason.ROUTE, Reason.EXPECTED):
            for name in here & models[model].files[block].keys():
                of_file[name] = max(of_file.get(name, Worth()), worth)
    return sorted(of_file, key=lambda name: of_file[name])


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
        lacking -= sizes[name]
    return tuple(out) if lacking <= 0 else None
