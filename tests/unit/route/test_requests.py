"""What a node expects to be asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.records import Span
from torrentlm.route.requests import (
    HALF_LIFE_S,
    MAX_ASKS,
    MAX_FOLLOWERS,
    MAX_ROUTES,
    ROUTE_S,
    Ask,
    Requests,
)

A, B, C = b"a", b"b", b"c"
FRONT, BACK = Span(0, 3), Span(4, 7)


def after(*asks: Ask, every_s: float = 100.0, requests: Requests | None = None) -> Requests:
    requests = requests or Requests()
    for number, (model, span) in enumerate(asks):
        requests.saw(model, span, number * every_s)
    return requests


def test_nothing_seen_nothing_expected():
    assert Requests().expected() == {}
    assert Requests().routes(0.0) == []


def test_what_followed_is_expected_to_follow():
    requests = after(*[(A, FRONT), (B, FRONT), (C, FRONT)] * 20, (A, FRONT))
    found = requests.expected()
    assert max(found, key=lambda ask: found[ask]) == (B, FRONT)
    assert sum(found.values()) == pytest.approx(1)


def test_without_followers_it_is_what_is_asked_for_at_all():
    requests = after(*[(A, FRONT), (A, FRONT), (B, FRONT)] * 20, requests=Requests(half_life_s=1e12, backoff=1e12))
    assert requests.expected()[A, FRONT] == pytest.approx(2 / 3, abs=0.01)


def test_old_habits_are_forgotten():
    requests = after(*[(A, FRONT)] * 50, every_s=1.0)
    requests.saw(B, FRONT, 60 + 10 * HALF_LIFE_S)
    requests.saw(B, FRONT, 60 + 10 * HALF_LIFE_S)
    assert requests.expected()[B, FRONT] > 0.9


def test_half_of_it_is_forgotten_each_half_life():
    requests = Requests(backoff=1e12)
    requests.saw(A, FRONT, 0.0)
    requests.saw(B, FRONT, HALF_LIFE_S)
    assert requests.expected()[A, FRONT] == pytest.approx(1 / 3)


def test_routes_are_the_latest_first_each_once_and_end():
    requests = after((A, FRONT), (B, FRONT), (A, FRONT), every_s=1.0)
    assert requests.routes(2.0) == [(A, FRONT), (B, FRONT)]
    assert requests.routes(1.5 + ROUTE_S) == [(A, FRONT)]
    assert requests.routes(3 + ROUTE_S) == []


ASKS = st.lists(
    st.tuples(
        st.integers(0, 200).map(lambda number: number.to_bytes(2, "big")),
        st.sampled_from([FRONT, BACK]),
        st.floats(0, 1e7),
    ),
    max_size=300,
)


@given(ASKS)
def test_memory_is_bounded_and_shares_add_up(asks):
    requests = Requests()
    now = 0.0
    for model, span, gap in asks:
        now += gap
        requests.saw(model, span, now)
    assert len(requests._asked) <= MAX_ASKS
    assert requests._followed.keys() <= requests._asked.keys()
    assert all(len(followers) <= MAX_FOLLOWERS for followers in requests._followed.values())
    assert len(requests.routes(now)) <= MAX_ROUTES
    found = requests.expected()
    assert len(found) <= MAX_ASKS
    assert all(share >= 0 for share in found.values())
    assert not asks or sum(found.values()) == pytest.approx(1)


def test_a_stranger_that_asks_for_everything_once_pushes_no_habit_out():
    requests = after(*[(A, FRONT), (B, FRONT)] * 20, every_s=1.0)
    for number in range(10 * MAX_ASKS):
        requests.saw(number.to_bytes(4, "big"), FRONT, 50.0)
    assert {(A, FRONT), (B, FRONT)} <= requests.expected().keys()
