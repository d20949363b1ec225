from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from torrentlm.compute.sizes import _RULES, Point, Size

points = st.builds(Point, st.integers(1, 6), st.integers(1, 40), st.integers(0, 40), st.integers(0, 20), st.booleans())
rules = st.sampled_from(sorted(_RULES))
SEEN = (
    Point(2, 5, source=11, last=True),
    Point(3, 7, source=6),
    Point(2, 10, source=8),
    Point(2, 2, 5, 11),
    Point(3, 1, 7, 6),
)
"""Steps at which no two rules agree everywhere."""


@given(rules, st.integers(1, 64), st.integers(0, 64), st.lists(points, min_size=1, max_size=5))
def test_any_affine_rule_gives_every_size_that_was_seen(rule: str, factor: int, offset: int, seen: list[Point]) -> None:
    """Another rule may be found, but none that contradicts what was seen; with enough steps it is the rule itself."""
    due = Size(rule, factor, offset)
    sizes = [(point, due.at(point)) for point in seen]
    found = Size.of([(point, size) for point, size in sizes if size is not None])
    assert [found.at(point) for point in seen] == [size for _, size in sizes]


@given(rules, st.integers(1, 64), st.integers(0, 64), points)
def test_the_steps_that_are_watched_tell_the_rules_apart(rule: str, factor: int, offset: int, point: Point) -> None:
    due = Size(rule, factor, offset)
    assert Size.of([(seen, due.at(seen) or 0) for seen in SEEN]) == due
    assert due.allows(due.at(point) or 0, point)
    assert not due.allows((due.at(point) or 0) + 1, point)


@given(st.lists(st.integers(0, 400), min_size=len(SEEN), max_size=len(SEEN)), st.lists(points, max_size=3))
def test_any_sizes_are_explained_or_not_known(sizes: list[int], others: list[Point]) -> None:
    found = Size.of(list(zip(SEEN, sizes, strict=True)))
    if found.rule == "?":
        assert all(found.at(point) is None and found.allows(12345, point) for point in (*SEEN, *others))
    else:
        assert [found.at(point) for point in SEEN] == sizes
        assert all((found.at(point) or 0) >= 0 for point in others)


@given(st.integers(0, 99), st.lists(points, min_size=1, max_size=5), points)
def test_what_never_changes_is_constant(size: int, seen: list[Point], other: Point) -> None:
    found = Size.of([(point, size) for point in seen])
    assert found == Size(offset=size) and found.at(other) == size
    assert found.allows(size, other) and not found.allows(size + 1, other) and not found.allows(size - 1, other)


@given(rules.filter(lambda rule: not rule.endswith("length")), points, st.integers(0, 500))
def test_only_what_grows_with_the_whole_text_may_be_cut_to_a_window(rule: str, point: Point, size: int) -> None:
    due = Size(rule, 1).at(point) or 0
    assume(size != due)
    assert not Size(rule, 1).allows(size, point)
    length = Size("length", 1, 1)
    assert length.allows(size, point) == (size <= point.length + 1)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((2, 3, 2, 2, 3), Size("batch", 1)),
        ((5, 7, 10, 2, 1), Size("tokens", 1)),
        ((5, 7, 10, 7, 8), Size("length", 1)),
        ((10, 21, 20, 4, 3), Size("batch × tokens", 1)),
        ((13, 17, 23, 7, 5), Size("tokens", 2, 3)),
        ((1, 7, 10, 2, 1), Size("wanted", 1)),
        ((2, 21, 20, 4, 3), Size("batch × wanted", 1)),
        ((8, 8, 8, 8, 8), Size(offset=8)),
        ((25, 49, 100, 4, 1), Size("?")),  # squares
        ((8, 7, 8, 8, 7), Size("?")),  # shrinks as the batch grows
        ((1, 3, 6, -2, -3), Size("?")),  # tokens - 4
    ],
)
def test_rules_by_example(sizes: tuple[int, ...], found: Size) -> None:
    assert Size.of(list(zip(SEEN, sizes, strict=True))) == found
