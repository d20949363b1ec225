"""What is fetched before anybody asks for it, in which order, and what it may displace."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.route.test_plan import candidate, snapshot
from torrentlm.records import Span
from torrentlm.route.prefetch import (
    AHEAD,
    ENOUGH_COPIES,
    Fetch,
    Limits,
    Reason,
    View,
    Worth,
    copies_of_others,
    in_use,
    plan,
    worths,
)
from torrentlm.route.requests import ROUTE_S, Requests

A, B = b"a", b"b"
PLENTY = Limits(room=10**9, rate=10**9)
LATER = 2 * ROUTE_S


def view(model: bytes, blocks: int, *spans: Span, copies: int = ENOUGH_COPIES, size: int = 10) -> View:
    files = [{f"{model.decode()}{block}": size} for block in range(blocks)]
    return View(files, spans, [copies] * blocks)


def names(fetches: list[Fetch]) -> list[str]:
    return [name for fetch in fetches for name in fetch.files]


def asked(*asks: tuple[bytes, Span]) -> Requests:
    requests = Requests()
    for model, span in asks:
        requests.saw(model, span, 0.0)
    return requests


def test_the_rest_of_the_route_comes_first_then_what_lies_behind():
    found = plan({A: view(A, 20)}, asked((A, Span(2, 4))), {"a2"}, [], PLENTY, 1.0)
    assert names(found) == [f"a{block}" for block in (3, 4, *range(5, 5 + AHEAD))]
    assert {fetch.worth.reason for fetch in found} == {Reason.ROUTE}


def test_then_what_is_adjacent_the_nearest_first():
    held = Span(8, 10)
    here = {f"a{block}" for block in held}
    found = names(plan({A: view(A, 40, held)}, Requests(), here, [], PLENTY, 0.0))
    assert found[:4] == ["a7", "a11", "a6", "a12"]
    assert sorted(found) == sorted(f"a{block}" for block in (*range(8), *range(11, 11 + AHEAD)))


def test_then_what_is_expected_then_what_is_rare():
    requests = asked(*[(B, Span(0, 1))] * 5)
    models = {A: view(A, 6, Span(0, 1), copies=1), B: view(B, 4, copies=2)}
    found = plan(models, requests, {"a0", "a1"}, [], PLENTY, LATER)
    reasons = [fetch.worth.reason for fetch in found]
    assert reasons == sorted(reasons, reverse=True)
    assert names(found) == ["a2", "a3", "a4", "a5", "b0", "b1", "b2", "b3"]
    assert reasons[-4:] == [Reason.EXPECTED, Reason.EXPECTED, Reason.RARE, Reason.RARE]


def test_the_rarest_that_somebody_has_comes_first():
    files = [{f"a{block}": 10} for block in range(5)]
    models = {A: View(files, (), [2, 0, 1, ENOUGH_COPIES, 1])}
    assert names(plan(models, Requests(), (), [], PLENTY, 0.0)) == ["a2", "a4", "a0"]
    models = {A: View(files, (), [2, 0, 1, ENOUGH_COPIES, 1], first=3)}
    assert names(plan(models, Requests(), (), [], PLENTY, 0.0)) == ["a4", "a2", "a0"]


def test_what_is_worth_more_stays():
    models = {A: view(A, 3, copies=1), B: view(B, 1)}
    requests = asked((B, Span(0, 0)))
    full = Limits(room=0, rate=10**9)
    assert plan(models, requests, {"b0"}, ["b0"], full, LATER) == []
    [fetch] = plan(models, requests, {"a0", "a1"}, ["a0", "a1"], full, LATER)
    assert (fetch.files, fetch.displaces) == (("b0",), ("a0",))


def test_equals_do_not_chase_each_other_out():
    models = {A: View([{"x": 10}, {"y": 10}], (), [1, 1])}
    full = Limits(room=0, rate=10**9)
    assert plan(models, Requests(), {"x"}, ["x"], full, 0.0) == []
    assert plan(models, Requests(), {"y"}, ["y"], full, 0.0) == []


def test_what_is_a_little_less_likely_than_what_is_fetched_stays():
    requests = Requests(backoff=1e12)
    for _ in range(3):
        requests.saw(A, Span(0, 0), 0.0)
    for _ in range(7):
        requests.saw(B, Span(0, 0), 0.0)
    models = {A: view(A, 1), B: view(B, 1)}
    full = Limits(room=0, rate=10**9)
    assert plan(models, requests, {"a0"}, ["a0"], full, LATER) == []
    for _ in range(7):
        requests.saw(B, Span(0, 0), 0.0)
    assert names(plan(models, requests, {"a0"}, ["a0"], full, LATER)) == ["b0"]


def test_what_is_hardly_likely_is_not_fetched():
    requests = asked((A, Span(0, 0)), *[(B, Span(0, 0))] * 100)
    models = {A: view(A, 1), B: view(B, 1)}
    assert names(plan(models, requests, (), [], PLENTY, LATER)) == ["b0"]


def test_what_routes_need_or_requests_make_likely_counts_as_used():
    requests = asked(*[(A, Span(0, 0))] * 5, *[(B, Span(0, 0))] * 50)
    models = {A: view(A, 3, Span(0, 0)), B: view(B, 3, copies=1)}
    here = {"a0", "a1", "b0", "b2"}
    assert in_use(models, requests, here, LATER) == ["a0", "b0"]
    assert in_use(models, requests, here, 1.0) == ["a1", "a0", "b2", "b0"]


def test_a_file_of_two_blocks_is_fetched_once_and_worth_the_better():
    tied = [{"embed": 40}, {"0": 10}, {"norm": 1, "embed": 40}]
    models = {A: View(tied, (Span(1, 1),), [3, 3, 3])}
    assert [fetch.files for fetch in plan(models, Requests(), {"0"}, [], PLENTY, 0.0)] == [("embed",), ("norm",)]
    rare = {A: View([{"z": 40}], (), [1])}
    assert plan(models | {B: rare[A]}, Requests(), {"0", "embed", "norm"}, ["embed"], Limits(0, 10**9), 0.0) == []


def test_a_plan_ends_with_what_the_link_brings():
    found = plan({A: view(A, 9, copies=1)}, Requests(), (), [], Limits(10**9, rate=5, horizon_s=5.0), 0.0)
    assert [fetch.size for fetch in found] == [10, 10, 10]
    assert plan({A: view(A, 9, copies=1)}, Requests(), (), [], Limits(10**9, rate=0), 0.0) == []


def test_copies_are_those_on_disk_or_served():
    first = candidate(1, Span(0, 1))
    assert copies_of_others(snapshot(first, candidate(2, Span(1, 5))), 4) == [1, 2, 1, 1]


BLOCKS = st.lists(
    st.dictionaries(st.sampled_from("abcdefghijkl"), st.just(0), min_size=1, max_size=3), min_size=1, max_size=10
)
SPANS = st.tuples(st.integers(0, 9), st.integers(0, 4)).map(lambda pair: Span(pair[0], sum(pair)))


@st.composite
def situations(draw):
    sizes = {name: draw(st.integers(1, 50)) for name in "abcdefghijkl"}
    models = {}
    for model in (A, B):
        files = [{name: sizes[name] for name in block} for block in draw(BLOCKS)]
        copies = draw(st.lists(st.integers(0, 4), min_size=len(files), max_size=len(files)))
        models[model] = View(files, draw(st.lists(SPANS, max_size=2)), copies, draw(st.integers(0, 9)))
    requests = Requests()
    for number, (model, span) in enumerate(draw(st.lists(st.tuples(st.sampled_from([A, B, b"c"]), SPANS)))):
        requests.saw(model, span, float(number))
    here = draw(st.sets(st.sampled_from("abcdefghijkl")))
    displaceable = draw(st.permutations(sorted(here)).map(lambda order: order[: len(order) // 2]))
    limits = Limits(draw(st.integers(-50, 200)), draw(st.integers(0, 100)), draw(st.sampled_from([0.5, 1.0, 60.0])))
    return models, requests, here, displaceable, limits, draw(st.floats(0, 1000)), sizes


@given(situations())
def test_promises_of_every_plan(situation):
    models, requests, here, displaceable, limits, now, sizes = situation
    fetches = plan(models, requests, here, displaceable, limits, now)
    value = worths(models, requests, now)
    of_file: dict[str, Worth] = {}
    for (model, block), worth in value.items():
        for name in models[model].files[block]:
            of_file[name] = max(of_file.get(name, Worth()), worth)

    room, present, gone = limits.room, set(here), set()
    for number, fetch in enumerate(fetches):
        files = models[fetch.model].files[fetch.block]
        assert fetch.worth == value[fetch.model, fetch.block]
        assert fetch.size == sum(sizes[name] for name in fetch.files) > 0
        assert models[fetch.model].copies[fetch.block] > 0
        # budgets: of the disk after every step, of the link but for the last block
        room += sum(sizes[name] for name in fetch.displaces) - fetch.size
        assert room >= min(0, limits.room) or fetch.displaces
        assert room >= 0
        assert sum(earlier.size for earlier in fetches[:number]) < limits.rate * limits.horizon_s
        # nothing goes that is not free to go, or that is not clearly worth less
        assert set(fetch.displaces) <= set(displaceable) - gone
        assert all(fetch.worth.clearly_above(of_file.get(name, Worth())) for name in fetch.displaces)
        gone |= set(fetch.displaces)
        # what is fetched was missing, makes the block whole, and stays
        assert not set(fetch.files) & present
        present |= set(fetch.files)
        assert files.keys() <= present
    assert not gone & {name for fetch in fetches for name in models[fetch.model].files[fetch.block]}
    assert [fetch.worth for fetch in fetches] == sorted((fetch.worth for fetch in fetches), reverse=True)
    # the same plan again, once it was carried out, wants none of it back
    again = plan(
        models,
        requests,
        present - gone,
        [name for name in displaceable if name not in gone],
        Limits(room, limits.rate, limits.horizon_s),
        now,
    )
    assert not {name for fetch in again for name in fetch.files} & gone
