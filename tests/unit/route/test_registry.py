"""What a node believes about its peers."""

from __future__ import annotations

from torrentlm.records import Endpoint, NodeKey, PeerRecord, Span
from torrentlm.route.registry import FAILURE_MEMORY_S, Registry

OWN, PEER = NodeKey(b"o" * 32), NodeKey(b"p" * 32)
HERE, THERE = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 2)
RECORD = PeerRecord(PEER, b"m" * 32, 2, sequence=3, resident=(Span(0, 1),))


def test_endpoints_count_as_known_until_they_answer():
    registry = Registry(OWN)
    registry.heard_of(HERE)
    registry.heard_of(THERE)
    assert (registry.snapshot(0).known, registry.snapshot(0).answered) == (2, 0)
    registry.connected(PEER, THERE)
    registry.heard_of(THERE)
    assert (registry.snapshot(0).known, registry.snapshot(0).answered) == (2, 0)
    assert registry.record(RECORD)
    snapshot = registry.snapshot(0)
    assert (snapshot.known, snapshot.answered) == (2, 1)
    assert snapshot.candidates[0].resident == (Span(0, 1),)
    registry.forget(HERE)
    assert registry.snapshot(0).known == 1


def test_records_of_strangers_and_older_ones_are_ignored():
    registry = Registry(OWN)
    assert not registry.record(RECORD)
    registry.connected(PEER, THERE)
    assert registry.record(RECORD)
    assert not registry.record(RECORD)
    assert not registry.record(PeerRecord(PEER, b"m" * 32, 2, sequence=2))
    assert registry.snapshot(0).candidates[0].resident == (Span(0, 1),)


def test_a_peer_that_left_is_no_candidate():
    registry = Registry(OWN)
    registry.connected(PEER, THERE)
    registry.record(RECORD)
    registry.disconnected(PEER)
    assert registry.snapshot(0).candidates == ()
    registry.connected(PEER, THERE)
    assert len(registry.snapshot(0).candidates) == 1


def test_round_trips_are_averaged_and_failures_forgotten():
    registry = Registry(OWN)
    registry.connected(PEER, THERE)
    registry.record(RECORD)
    registry.round_trip(PEER, 0.1)
    registry.round_trip(PEER, 0.2)
    registry.failed(PEER, now=100)
    seen = registry.snapshot(101).candidates[0]
    assert seen.rtt_s is not None and 0.1 < seen.rtt_s < 0.2
    assert seen.suspect
    assert not registry.snapshot(100 + FAILURE_MEMORY_S).candidates[0].suspect
