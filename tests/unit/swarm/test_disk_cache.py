"""What goes so that others fit: never what is pinned, never more than it takes, the longest unused first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torrentlm.swarm.disk_cache import Eviction, Kept, Refusal, plan

PLENTY = 10**12


def complete(size: int, used: float = 0.0, *, pinned: bool = False) -> Kept:
    return Kept(size, size, used, pinned)


def test_where_there_is_room_nothing_goes() -> None:
    assert plan({"new": 40}, {"old": complete(60)}, 100, PLENTY) == Eviction(())
    assert plan({"new": 40}, {"old": complete(60)}, None, 40) == Eviction(())


def test_the_longest_unused_go_first() -> None:
    kept = {"a": complete(30, 3), "b": complete(30, 1), "c": complete(30, 2)}
    assert plan({"new": 40}, kept, 100, PLENTY) == Eviction(("b",))
    assert plan({"new": 41}, kept, 100, PLENTY) == Eviction(("b", "c"))
    assert plan({"new": 60}, kept, None, 10) == Eviction(("b", "c"))


def test_a_small_one_is_not_removed_beside_a_large_one_that_is_enough() -> None:
    kept = {"small": complete(5, 1), "large": complete(90, 2)}
    assert plan({"new": 80}, kept, 100, PLENTY) == Eviction(("large",))


def test_wanted_and_coming_files_stay_and_count_whole() -> None:
    kept = {"half": Kept(20, 20, 0, pinned=False), "coming": Kept(10, 50, 0, pinned=True), "old": complete(30, 9)}
    assert plan({"half": 40}, kept, 120, PLENTY) == Eviction(())
    assert plan({"half": 40}, kept, 119, PLENTY) == Eviction(("old",))
    assert plan({"half": 40}, kept, None, 60) == Eviction(())
    assert plan({"half": 40}, kept, None, 59) == Eviction(("old",))


def test_a_refusal_says_what_would_do() -> None:
    kept = {"pinned": complete(70, pinned=True), "old": complete(20)}
    refused = plan({"new": 40}, kept, 100, PLENTY)
    assert refused == Refusal(missing=40, staying=70, enough=110, short=0, evictable=("old",))
    assert plan({"new": 40}, kept, 110, PLENTY) == Eviction(("old",))
    refused = plan({"new": 40}, kept, None, 15)
    assert refused == Refusal(missing=40, staying=70, enough=None, short=5, evictable=("old",))


def test_what_is_here_is_not_refused_under_a_budget_that_was_lowered() -> None:
    kept = {"pinned": complete(70, pinned=True), "old": complete(20)}
    assert plan({"pinned": 70}, kept, 50, PLENTY) == Eviction(("old",))


FILES = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(
        lambda taken, more, used, pinned: Kept(taken, taken + (more if pinned else 0), used, pinned),
        st.integers(0, 50),
        st.integers(0, 50),
        st.integers(0, 5),
        st.booleans(),
    ),
)


@given(
    st.dictionaries(st.sampled_from("abwxyz"), st.integers(1, 50)),
    FILES,
    st.none() | st.integers(0, 300),
    st.integers(0, 200),
)
def test_a_plan_is_enough_and_no_more(
    wanted: dict[str, int], kept: dict[str, Kept], budget: int | None, free: int
) -> None:
    def fits(gone: set[str]) -> bool:
        sizes = {name: (file.taken, file.whole) for name, file in kept.items() if name not in gone}
        sizes |= {name: (min(sizes.get(name, (0, 0))[0], size), size) for name, size in wanted.items()}
        freed = sum(kept[name].taken for name in gone)
        to_come = sum(whole - taken for taken, whole in sizes.values())
        return (budget is None or sum(whole for _, whole in sizes.values()) <= budget) and to_come <= free + freed

    may_go = {name for name, file in kept.items() if not file.pinned and name not in wanted}
    match plan(wanted, kept, budget, free):
        case Eviction(names):
            assert set(names) <= may_go
            missing = any(size > (kept[name].taken if name in kept else 0) for name, size in wanted.items())
            assert fits(set(names)) or (not missing and set(names) == may_go)
            if fits(may_go):
                assert all(not fits(set(names) - {name}) for name in names)
        case Refusal(evictable=evictable):
            assert set(evictable) == may_go
            assert not fits(may_go)
