"""What a node believes about its peers."""

from __future__ import annotations

from dataclasses import replace

from torrentlm.records import Endpoint, NodeKey, PeerRecord, Span
from torrentlm.route.registry import FAILURE_MEMORY_S, MAX_PEERS, Registry

OWN, PEER, CLIENT = NodeKey(b"o" * 32), NodeKey(b"p" * 32), NodeKey(b"c" * 32)
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
    registry.retain({THERE})
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
    restarted = PeerRecord(PEER, b"m" * 32, 2, sequence=0, held=(Span(0, 1),))
    assert registry.record(restarted)
    assert [candidate.held for candidate in registry.snapshot(0).candidates] == [(Span(0, 1),)]


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


def test_a_client_that_left_is_forgotten_and_a_holder_is_not():
    registry = Registry(OWN)
    for node, record in ((PEER, RECORD), (CLIENT, PeerRecord(CLIENT, b"m" * 32, 1))):
        registry.connected(node, THERE)
        registry.record(record)
        registry.disconnected(node)
    assert registry.snapshot(0).known == 1
    registry.retain({THERE})
    assert registry.snapshot(0).known == 1
    registry.retain({HERE})
    assert registry.snapshot(0).known == 0


def test_the_connected_are_kept_whatever_is_retained():
    registry = Registry(OWN)
    registry.connected(PEER, THERE)
    registry.record(RECORD)
    registry.retain(())
    assert registry.snapshot(0).answered == 1


def test_it_does_not_grow_without_bound():
    registry = Registry(OWN)
    for number in range(MAX_PEERS + 5):
        registry.heard_of(Endpoint("10.0.0.3", 1 + number))
    assert registry.snapshot(0).known == MAX_PEERS
    registry.retain(())
    keys = [NodeKey(number.to_bytes(32, "big")) for number in range(MAX_PEERS + 5)]
    for key in keys:
        registry.connected(key, HERE)
    assert registry.snapshot(0).known == MAX_PEERS
    registry.record(PeerRecord(keys[0], b"m" * 32, 2, resident=(Span(0, 1),)))
    registry.disconnected(keys[0])
    registry.connected(PEER, THERE)
    registry.record(RECORD)
    assert [candidate.node for candidate in registry.snapshot(0).candidates] == [PEER]


def test_what_a_peer_takes_of_adapters_is_in_the_snapshot():
    registry = Registry(OWN)
    registry.connected(PEER, THERE)
    registry.record(replace(RECORD, adapters=1000))
    assert [candidate.adapters for candidate in registry.snapshot(0).candidates] == [1000]
