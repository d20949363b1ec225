"""Numbers and ranges as a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torrentlm.errors import ConfigError
from torrentlm.records import spans_of


def checked(words: str, what: str) -> str:
    """``words`` as typed. Raises ConfigError if bytes that are no UTF-8 stand in them (as lone surrogates)."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} is not valid UTF-8 at character {error.start + 1}; convert it first.") from None
    return words


def read(reader: Callable[[], str], what: str) -> str:
    """What ``reader`` reads, checked; the same ConfigError for bytes that the stream itself refuses."""
    try:
        return checked(reader(), what)
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not valid UTF-8; convert it first.") from None


def size(count: float) -> str:
    """``141_900_000`` → ``142 MB``: decimal, three digits, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def rate(per_second: float) -> str:
    return f"{size(per_second)}/s"


def duration(seconds: float) -> str:
    """``75`` → ``1:15``, ``4000`` → ``1:06:40``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def left_out(names: Sequence[str]) -> str:
    """``left out: 18 tensors that no block reads, such as model.layers.4.mlp.up_proj.weight``."""
    return f"left out: {count(len(names), 'tensor')} that no block reads, such as {min(names)}"


def blocks(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 7]`` → ``blocks 0-2, 7``."""
    numbers = set(numbers)
    if not numbers:
        return "no blocks"
    return f"{'block' if len(numbers) == 1 else 'blocks'} {', '.join(map(str, spans_of(numbers)))}"


def proof(found: Mapping[str, Any] | None) -> str:
    """What ``inspect --json`` has as ``proof``: ``exact in F32, BF16 within 0.4% (28 of 28 tokens agree), …``."""
    if found is None:
        return "unknown"
    outcomes = ", ".join(_outcome(outcome) for outcome in found["outcomes"])
    how = f"{count(found['parts'], 'part')}, {'real text' if found['text'] else 'random tokens'}"
    said = f"; says {found['source']}" if "source" in found else ""
    return f"{outcomes}; {how}; torch {found['torch']}, transformers {found['transformers']}{said}"


def _outcome(outcome: Mapping[str, Any]) -> str:
    dtype, agree = outcome["dtype"], f"{outcome['agreeing']} of {outcome['tokens']} tokens agree"
    if outcome["exact"]:
        return f"exact in {dtype}"
    if outcome["good"]:
        return f"{dtype} within {outcome['max_rel']:.1g} of the whole ({agree}; allowed {outcome['tolerance']:.1g})"
    return f"{dtype} OFF by {outcome['max_rel']:.1g} of the whole ({agree}; allowed {outcome['tolerance']:.1g})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines with aligned columns, cut nowhere."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
