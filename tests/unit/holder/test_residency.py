"""What is in a device's memory: budgets never exceeded, pins never broken, the least recently used first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torrentlm.holder.residency import Plan, Resident, Shortage, plan, shrink

SIZES = {name: 1 + number * 3 for number, name in enumerate("abcdefgh")}


def test_the_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    here = {"a": Resident(4), "b": Resident(3, pins=1), "c": Resident(2), "d": Resident(1)}
    assert plan(here, {"e": 4}, 10) == Plan(("e",), ("a",))
    assert plan(here, {"e": 5}, 10) == Plan(("e",), ("a", "c"))
    assert plan(here, {"a": 4, "e": 3}, 10) == Plan(("e",), ("c", "d"))
    assert plan(here, {"c": 2}, 10) == Plan((), ())


def test_a_shortage_says_what_is_in_the_way() -> None:
    here = {"a": Resident(4), "b": Resident(3, pins=1)}
    assert plan(here, {"e": 8}, 10) == Shortage(wanted=8, pinned=3, budget=10)
    assert not Shortage(8, 3, 10).hopeless
    assert Shortage(11, 0, 10).hopeless


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=8), st.integers(-5, 90))
def test_shrinking_frees_what_is_asked_or_all_that_can_go(entries: list[tuple[int, int]], surplus: int) -> None:
    here = {number: Resident(size, pins) for number, (size, pins) in enumerate(entries)}
    gone = shrink(here, surplus)
    loose = [number for number, resident in here.items() if not resident.pins]
    assert list(gone) == loose[: len(gone)]
    freed = sum(here[number].bytes for number in gone)
    assert freed >= surplus or list(gone) == loose
    assert not gone or freed - here[gone[-1]].bytes < surplus


class Machine(RuleBasedStateMachine):
    """Sessions come and go over files of many sizes, while the budget changes; a plan is carried out as it says."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = 30
        self.here: dict[str, Resident] = {}
        self.sessions: list[tuple[str, ...]] = []
        self.order: list[str] = []

    @rule(names=st.sets(st.sampled_from(sorted(SIZES)), min_size=1, max_size=4))
    def open(self, names: set[str]) -> None:
        wanted = {name: SIZES[name] for name in sorted(names)}
        found = plan(self.here, wanted, self.budget)
        pinned = {name for session in self.sessions for name in session}
        least = sum(SIZES[name] for name in pinned | names)
        if isinstance(found, Shortage):
            assert least > self.budget
            return
        assert least <= self.budget
        assert not pinned & set(found.evictions)
        assert not names & set(found.evictions)
        for name in found.evictions:
            del self.here[name]
        assert self.bytes <= self.budget  # before anything is loaded, too
        for name in found.loads:
            self.here[name] = Resident(SIZES[name])
            assert self.bytes <= self.budget
        for name in wanted:
            resident = self.here.pop(name)
            self.here[name] = Resident(resident.bytes, resident.pins + 1)
        self.sessions.append(tuple(wanted))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = self.sessions.pop(data.draw(st.integers(0, len(self.sessions) - 1)))
        for name in session:
            resident = self.here.pop(name)
            self.here[name] = Resident(resident.bytes, resident.pins - 1)

    @rule(budget=st.integers(10, 60))
    def others_take_or_give_memory(self, budget: int) -> None:
        for name in shrink(self.here, self.bytes - budget):
            assert not self.here[name].pins
            del self.here[name]
        self.budget = max(budget, self.bytes)  # what is pinned stays

    @property
    def bytes(self) -> int:
        return sum(resident.bytes for resident in self.here.values())

    @invariant()
    def within_the_budget_with_all_pins_in_place(self) -> None:
        assert self.bytes <= self.budget
        for session in self.sessions:
            assert all(self.here[name].pins > 0 for name in session)
        assert sum(resident.pins for resident in self.here.values()) == sum(map(len, self.sessions))


TestMachine = Machine.TestCase
