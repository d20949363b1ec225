"""Which span a joining holder takes, and which part of it each of its devices."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.route.test_plan import candidate, snapshot
from torrentlm.records import Span
from torrentlm.route.assign import SLABS, beyond, choose_span, copies, divide, extended, fits, set_aside


def apart(*sizes: int) -> list[dict[str, int]]:
    """Blocks of these sizes that share no file."""
    return [{str(block): size} for block, size in enumerate(sizes)]


def test_an_empty_swarm_is_filled_from_the_front():
    assert choose_span(apart(*[10] * 6), [0] * 6, 30) == Span(0, 2)


def test_the_first_copy_of_anything_comes_before_a_second_copy():
    assert choose_span(apart(*[10] * 6), [1, 1, 0, 0, 1, 1], 20) == Span(2, 3)
    assert choose_span(apart(*[10] * 6), [3, 1, 1, 1, 2, 0], 10) == Span(5, 5)


def test_three_that_join_one_after_the_other_cover_everything():
    sizes, counts = apart(*[10] * 9), [0] * 9
    taken = []
    for _ in range(3):
        span = choose_span(sizes, counts, 30)
        assert span is not None
        taken.append(span)
        for block in span:
            counts[block] += 1
    assert taken == [Span(0, 2), Span(3, 5), Span(6, 8)]


def test_nothing_fits():
    assert choose_span(apart(10, 20), [0, 0], 9) is None
    assert choose_span(apart(100, 8, 100), [5, 9, 0], 9) == Span(1, 1)


def test_the_disk_limits_only_what_is_to_be_fetched():
    assert choose_span(apart(*[10] * 6), [0] * 6, 60, missing=apart(*[10] * 6), room=20) == Span(0, 1)
    assert choose_span(apart(*[10] * 6), [0] * 6, 30, missing=apart(10, 10, 10, 0, 0, 10), room=10) == Span(2, 4)
    assert choose_span(apart(*[10] * 6), [0] * 6, 60, missing=apart(*[0] * 6), room=-5) == Span(0, 5)
    assert choose_span(apart(10, 10), [0] * 2, 60, missing=apart(10, 10), room=9) is None


def test_a_shared_file_counts_once():
    tied = [{"embed": 40}, {"0": 10}, {"1": 10}, {"norm": 1, "embed": 40}]
    assert choose_span(tied, [0] * 4, 61) == Span(0, 3)
    assert choose_span(tied, [0] * 4, 60) == Span(0, 2)
    assert choose_span(tied, [1, 0, 0, 0], 61) == Span(0, 3)
    assert choose_span(tied, [0] * 4, 1000, missing=tied, room=61) == Span(0, 3)


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 300),
)
def test_no_affordable_span_is_worth_more(blocks, budget):
    bytes_of = {name: size for files, _ in blocks for name, size in files.items()}
    sizes, counts = [{name: bytes_of[name] for name in files} for files, _ in blocks], [count for _, count in blocks]

    def worth(span: Span) -> float:
        return sum(1 / (1 + counts[block]) ** 2 for block in span)

    affordable = [
        Span(first, last)
        for first in range(len(blocks))
        for last in range(first, len(blocks))
        if sum(bytes_of[name] for name in set().union(*sizes[first : last + 1])) <= budget
    ]
    chosen = choose_span(sizes, counts, budget)
    if not affordable:
        assert chosen is None
    else:
        assert chosen in affordable
        assert chosen is not None and worth(chosen) >= max(map(worth, affordable)) - 1e-8


def test_copies_count_peers_not_spans():
    first = candidate(1, Span(0, 1), Span(1, 2))
    assert copies(snapshot(first, candidate(2, Span(1, 1))), 4) == [1, 2, 1, 0]


blocks_and_budgets = st.tuples(
    st.lists(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3), max_size=7),
    st.lists(st.integers(1, 50), min_size=6, max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
)


Parts = tuple[range, ...]


def fullness(sizes: list[dict[str, int]], budgets: list[int], parts: Parts) -> list[float]:
    """How full each device is."""
    taken = [sum({name: size for at in part for name, size in sizes[at].items()}.values()) for part in parts]
    return [
        size / budget if budget else float("inf") if size else 0.0 for size, budget in zip(taken, budgets, strict=True)
    ]


def every_way(sizes: list[dict[str, int]], budgets: list[int]) -> list[list[float]]:
    """How full each device is, in every division there is."""
    return [
        fullness(sizes, budgets, tuple(range(first, last) for first, last in pairwise((0, *cuts, len(sizes)))))
        for cuts in combinations_with_replacement(range(len(sizes) + 1), len(budgets) - 1)
    ]


@given(blocks_and_budgets)
def test_no_division_leaves_the_fullest_device_emptier(given_: tuple[list[set[str]], list[int], list[int]]) -> None:
    names, bytes_of, budgets = given_
    sizes = [{name: bytes_of["abcdef".index(name)] for name in block} for block in names]
    parts = divide(sizes, budgets)
    assert len(parts) == len(budgets)
    assert [at for part in parts for at in part] == list(range(len(sizes)))
    best = min(max(way) for way in every_way(sizes, budgets))
    found = max(fullness(sizes, budgets, parts))
    assert found <= best + 1e-9
    assert fits(sizes, budgets) == (best <= 1) == (found <= 1)


@given(blocks_and_budgets, st.sets(st.integers(0, 3)))
def test_what_helps_gets_as_little_as_can_be(
    given_: tuple[list[set[str]], list[int], list[int]], places: set[int]
) -> None:
    names, bytes_of, budgets = given_
    sizes = [{name: bytes_of["abcdef".index(name)] for name in block} for block in names]
    helping = {at for at in places if at < len(budgets)}

    def split(way: list[float]) -> tuple[float, float]:
        """The fullest of those that help, and of the others."""
        helps = max((full for at, full in enumerate(way) if at in helping), default=0.0)
        return helps, max((full for at, full in enumerate(way) if at not in helping), default=0.0)

    parts = divide(sizes, budgets, helping)
    assert [at for part in parts for at in part] == list(range(len(sizes)))
    found = split(fullness(sizes, budgets, parts))
    ways = [split(way) for way in every_way(sizes, budgets)]
    within = [helps for helps, others in ways if others <= 1]
    if within and min(within) <= 1:
        assert found[0] <= min(within) + 1e-9 and found[1] <= 1
    else:
        assert max(found) <= min(max(way) for way in ways) + 1e-9


def test_a_division_in_proportion_and_over_few_devices() -> None:
    assert divide(apart(*[10] * 6), [30, 60]) == (range(2), range(2, 6))
    assert divide(apart(*[10] * 6), [100] * 4) == (range(2), range(2, 4), range(4, 6), range(6, 6))
    assert divide(apart(*[10] * 3), [0, 0]) == (range(3), range(3, 3))
    assert divide(apart(*[10] * 6), [40, 1000], {1}) == (range(4), range(4, 6))
    assert divide(apart(*[10] * 6), [1000, 40], {0}) == (range(2), range(2, 6))
    assert divide(apart(*[10] * 6), [1000, 30, 30], {0}) == (range(0), range(3), range(3, 6))
    tied = [{"embed": 40}, {"0": 10}, {"1": 10}, {"norm": 1, "embed": 40}]
    assert divide(tied, [50, 60]) == (range(2), range(2, 4))


def kept(sizes: list[dict[str, int]], aside: tuple[int, ...], may: dict[int, int]) -> int:
    """Bytes on the device with these blocks in RAM."""
    files = {name: size for block, own in enumerate(sizes) if block not in aside for name, size in own.items()}
    return sum(files.values()) + SLABS * max((may[block] for block in aside), default=0)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_as_few_blocks_as_will_do_stay_in_ram(blocks: list[tuple[int, bool, int]], budget: int, ram: int) -> None:
    sizes = [{str(block): size} | ({} if layers else {"tied": 5}) for block, (size, layers, _) in enumerate(blocks)]
    may = {block: size + more for block, (size, layers, more) in enumerate(blocks) if layers}
    aside = set_aside(sizes, may, budget, ram)
    last = sorted(may)
    ways = [tuple(last[at:]) for at in range(len(last), -1, -1)]
    able = [way for way in ways if kept(sizes, way, may) <= budget and sum(may[block] for block in way) <= ram]
    assert aside == (able[0] if able else None)
    if aside is not None:
        assert set(aside) <= may.keys()
        assert kept(sizes, aside, may) <= budget and sum(may[block] for block in aside) <= ram


@pytest.mark.parametrize("count", range(5, 9))
def test_equal_blocks_take_what_was_counted_on(count: int) -> None:
    """A span of as many blocks as ``beyond`` says can be held, and one more cannot."""
    sizes, may = apart(*[10] * count), dict.fromkeys(range(count), 10)
    budget, ram = 40, 30 + 10 * (count - 5)
    assert beyond(budget, ram, 10) == 10 * count
    found = set_aside(sizes, may, budget, ram)
    assert found == tuple(range(2, count))
    assert set_aside(apart(*[10] * (count + 1)), dict.fromkeys(range(count + 1), 10), budget, ram) is None
    assert set_aside(sizes, may, 10 * count, 0) == () and beyond(40, 19, 10) == 40


def test_a_span_is_extended_to_the_side_that_has_fewer_copies() -> None:
    sizes, counts = apart(*[10] * 8), [1, 0, 1, 0, 0, 2, 0, 0]
    assert extended(Span(3, 4), sizes, counts, 20) == Span(3, 4)
    assert extended(Span(3, 4), sizes, counts, 45) == Span(1, 4)
    assert extended(Span(3, 4), sizes, counts, 50) == Span(0, 4)
    assert extended(Span(3, 4), sizes, counts, 1000) == Span(0, 7)
    assert extended(Span(3, 4), sizes, counts, 1000, missing=sizes, room=30) == Span(2, 4)
    large = apart(10, 10, 90, 10, 10, 10, 90, 10)
    assert extended(Span(3, 4), large, counts, 60) == Span(3, 5)  # what does not fit on one side, the other may have
