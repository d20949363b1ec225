"""Numbers and ranges as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torrentlm.records import spans_of


def size(count: float) -> str:
    """``141_900_000`` → ``142 MB``: decimal, three digits, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def rate(per_second: float) -> str:
    return f"{size(per_second)}/s"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def blocks(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 7]`` → ``blocks 0-2, 7``."""
    numbers = set(numbers)
    if not numbers:
        return "no blocks"
    return f"{'block' if len(numbers) == 1 else 'blocks'} {', '.join(map(str, spans_of(numbers)))}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines with aligned columns, cut nowhere."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
