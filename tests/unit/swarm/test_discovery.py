"""Which endpoints are tried, and when."""

from __future__ import annotations

from torrentlm.records import Endpoint
from torrentlm.swarm import discovery
from torrentlm.swarm.discovery import Discovery, Source


def endpoint(number: int) -> Endpoint:
    return Endpoint(f"127.0.{number // 250}.{number % 250 + 1}", 7000)


def fresh(own: Endpoint | None = None) -> Discovery:
    return Discovery(own=lambda candidate: candidate == own)


def test_best_source_first_and_each_once() -> None:
    known = fresh()
    sources = [Source.DHT, Source.GOSSIP, Source.LAST_SESSION, Source.STATIC, Source.MAGNET]
    assert all(known.add(endpoint(number), source) for number, source in enumerate(sources))
    assert known.due(0.0, 2) == [endpoint(4), endpoint(3)]
    assert known.due(0.0, 9) == [endpoint(2), endpoint(1), endpoint(0)]
    assert known.due(0.0, 9) == []


def test_known_endpoint_is_no_news_but_its_best_source_counts() -> None:
    known = fresh()
    known.add(endpoint(0), Source.GOSSIP)
    known.add(endpoint(1), Source.DHT)
    assert not known.add(endpoint(1), Source.MAGNET)
    assert not known.add(endpoint(1), Source.DHT)
    assert known.due(0.0, 1) == [endpoint(1)]


def test_own_addresses_are_left_out_even_when_learned_late() -> None:
    own: set[Endpoint] = {endpoint(0)}
    known = Discovery(own=own.__contains__)
    assert not known.add(endpoint(0), Source.DHT)
    known.add(endpoint(1), Source.DHT)
    known.met(endpoint(1), 0.0)
    own.add(endpoint(1))
    assert known.due(1e6, 9) == []
    assert known.endpoints() == known.answered() == ()


def test_dead_ones_are_tried_less_and_less() -> None:
    known = fresh()
    known.add(endpoint(0), Source.STATIC)
    assert known.due(0.0, 1) == [endpoint(0)]
    now, pauses = 0.0, []
    for _ in range(12):
        known.failed(endpoint(0), now)
        before = now
        while not known.due(now, 1):
            now += 0.5
        pauses.append(now - before)
    assert pauses[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == discovery.LONGEST_PAUSE_S


def test_answer_ends_the_backoff() -> None:
    known = fresh()
    known.add(endpoint(0), Source.STATIC)
    for _ in range(5):
        known.failed(endpoint(0), 0.0)
    known.met(endpoint(0), 1.0)
    assert known.due(1.0 + discovery.ANSWERED_PAUSE_S, 1) == [endpoint(0)]
    known.failed(endpoint(0), 40.0)
    assert known.due(40.0 + discovery.FIRST_PAUSE_S, 1) == [endpoint(0)]


def test_strangers_word_is_forgotten_the_users_is_not() -> None:
    known = fresh()
    for number, source in enumerate(Source):
        known.add(endpoint(number), source)
        for _ in range(discovery.FORGET_AFTER_FAILURES):
            known.failed(endpoint(number), 0.0)
    assert set(known.endpoints()) == {endpoint(number) for number, source in enumerate(Source) if source.trusted}


def test_try_without_report_counts_as_over() -> None:
    known = fresh()
    known.add(endpoint(0), Source.DHT)
    assert known.due(0.0, 1)
    assert not known.due(discovery.TRY_LIMIT_S - 1, 1)
    assert known.due(discovery.TRY_LIMIT_S, 1)


def test_answered_are_the_latest_first() -> None:
    known = fresh()
    for number in range(4):
        known.add(endpoint(number), Source.DHT)
    known.met(endpoint(1), 1.0)
    known.met(endpoint(2), 2.0)
    known.met(endpoint(3), 3.0)
    known.failed(endpoint(2), 4.0)
    assert known.answered() == (endpoint(3), endpoint(1))
    assert known.endpoints() == (endpoint(3), endpoint(1), endpoint(0), endpoint(2))


def test_who_dials_us_is_known_from_then_on() -> None:
    known = fresh()
    known.met(endpoint(7), 1.0)
    assert known.answered() == (endpoint(7),)


def test_strangers_cannot_crowd_out_what_matters() -> None:
    known = fresh()
    known.add(endpoint(0), Source.STATIC)
    known.add(endpoint(1), Source.DHT)
    known.met(endpoint(1), 0.0)
    for number in range(2, discovery.MAX_ENDPOINTS + 500):
        known.add(endpoint(number), Source.DHT)
    assert len(known.endpoints()) == discovery.MAX_ENDPOINTS
    assert not known.add(endpoint(5000), Source.DHT)
    assert known.add(endpoint(5001), Source.MAGNET)
    assert {endpoint(0), endpoint(1), endpoint(5001)} <= set(known.endpoints())
