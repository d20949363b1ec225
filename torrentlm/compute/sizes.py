"""How the axes of a tensor grow with a step, told from the sizes that were seen at a few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """The sizes of a step: rows, new tokens per row, tokens per row before it, tokens an encoder read (0: none).

    ``last``: only the last position's logits are wanted, so that a model may leave the other positions out at the end.
    """

    batch: int
    tokens: int
    past: int = 0
    source: int = 0
    last: bool = False

    @property
    def length(self) -> int:
        return self.past + self.tokens

    @property
    def wanted(self) -> int:
        """The positions per row that the head is to see."""
        return min(self.tokens, 1) if self.last else self.tokens


_RULES: dict[str, Callable[[Point], int]] = {
    "batch": lambda point: point.batch,
    "tokens": lambda point: point.tokens,
    "length": lambda point: point.length,
    "source": lambda point: point.source,
    "wanted": lambda point: point.wanted,
    "batch × tokens": lambda point: point.batch * point.tokens,
    "batch × length": lambda point: point.batch * point.length,
    "batch × source": lambda point: point.batch * point.source,
    "batch × wanted": lambda point: point.batch * point.wanted,
}


@dataclass(frozen=True, slots=True)
class Size:
    """``factor`` × what the rule names + ``offset``; a constant ``offset`` where there is no rule's name, anything
    where the rule is "?".
    """

    rule: str = ""
    factor: int = 0
    offset: int = 0

    def at(self, point: Point) -> int | None:
        """The size at a step; None if it follows no rule that is known."""
        if self.rule == "?":
            return None
        return self.offset + (self.factor * _RULES[self.rule](point) if self.rule else 0)

    def allows(self, size: int, point: Point) -> bool:
        """Whether an axis may have this size. What grows with the whole text may be cut to a window."""
        due = self.at(point)
        return due is None or size == due or (size < due and self.rule.endswith("length"))

    @classmethod
    def of(cls, seen: Sequence[tuple[Point, int]]) -> Size:
        """The simplest rule that gives all the sizes that were seen."""
        size = seen[0][1]
        if all(other == size for _, other in seen):
            return cls(offset=size)
        found = [candidate for rule in _RULES if (candidate := cls._by(rule, seen)) is not None]
        return min(found, key=lambda candidate: candidate.offset > 0, default=cls("?"))

    @classmethod
    def _by(cls, rule: str, seen: Sequence[tuple[Point, int]]) -> Size | None:
        first, size = seen[0]
        value = _RULES[rule]
        for point, other in seen:
            if value(point) != value(first):
                factor, rest = divmod(other - size, value(point) - value(first))
                candidate = cls(rule, factor, size - factor * value(first))
                fits = not rest and factor > 0 and candidate.offset >= 0
                return candidate if fits and all(candidate.at(where) == got for where, got in seen) else None
        return None
