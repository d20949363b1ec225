from __future__ import annotations

import pytest

from torrentlm.errors import RemoteProtocolError
from torrentlm.records import NodeKey
from torrentlm.wire import pairing
from torrentlm.wire.handshake import Authenticated
from torrentlm.wire.pairing import Admission, PipeTable
from torrentlm.wire.pipe import PipeCore

from .pipes import HIGH, LOW, authenticated


class Pairing:
    """Two tables whose handshakes complete when the test says so."""

    def __init__(self) -> None:
        self.low, self.high = PipeTable(LOW), PipeTable(HIGH)
        self.next_carrier = 0

    def handshake(self) -> tuple[Authenticated, Authenticated]:
        """What both ends would learn from PROOFs made now."""
        low = self.low.generation(authenticated(HIGH).peer)
        high = self.high.generation(authenticated(LOW).peer)
        return authenticated(HIGH, low, high), authenticated(LOW, high, low)

    def connect(self) -> tuple[Admission, Admission]:
        seen_by_low, seen_by_high = self.handshake()
        self.next_carrier += 1
        return self.low.admit(self.next_carrier, seen_by_low), self.high.admit(self.next_carrier, seen_by_high)


def test_all_carriers_of_two_nodes_make_one_pipe() -> None:
    pair = Pairing()
    first, _ = pair.connect()
    second, _ = pair.connect()
    assert first.is_new
    assert (second.core, second.is_new, second.replaced) == (first.core, False, None)
    assert second.core.carriers == (1, 2)
    assert pair.low.get(HIGH) is first.core


def test_handshakes_side_by_side_make_one_pipe() -> None:
    pair = Pairing()
    early, _ = pair.handshake()
    first, _ = pair.connect()
    assert pair.low.admit(9, early).core is first.core


@pytest.mark.parametrize("closer", ["low", "high"])
def test_a_pipe_that_one_end_closed_is_new_for_both(closer: str) -> None:
    pair = Pairing()
    old = dict(zip(("low", "high"), (admission.core for admission in pair.connect()), strict=True))
    getattr(pair, closer).forget(old[closer])
    new = dict(zip(("low", "high"), pair.connect(), strict=True))
    other = "high" if closer == "low" else "low"
    assert new[closer].is_new
    assert new[closer].replaced is None
    assert new[other].is_new
    assert new[other].replaced is old[other]
    again = pair.connect()
    assert not again[0].is_new
    assert not again[1].is_new


def test_a_handshake_begun_before_the_pipe_was_closed_is_refused() -> None:
    pair = Pairing()
    seen_by_low, seen_by_high = pair.handshake()
    old, _ = pair.connect()
    pair.low.forget(old.core)
    with pytest.raises(RemoteProtocolError):
        pair.low.admit(8, seen_by_low)  # its own PROOF is out of date
    new, _ = pair.connect()
    with pytest.raises(RemoteProtocolError):
        pair.high.admit(8, seen_by_high)  # the peer's is
    assert pair.low.get(HIGH) is new.core


def test_a_restarted_peer_is_a_new_pipe() -> None:
    table = PipeTable(LOW)
    old = table.admit(1, authenticated(HIGH, instance=b"before__")).core
    admission = table.admit(2, authenticated(HIGH, instance=b"after___"))
    assert admission.is_new
    assert admission.replaced is old


def test_forgetting_twice_or_what_was_replaced_changes_nothing() -> None:
    table = PipeTable(LOW)
    old = table.admit(1, authenticated(HIGH)).core
    new = table.admit(2, authenticated(HIGH, peer_generation=1)).core
    table.forget(old)
    assert table.get(HIGH) is new
    table.forget(new)
    table.forget(new)
    assert table.generation(authenticated(HIGH).peer) == 1


def test_generations_never_fall_although_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MAX_REMEMBERED", 3)
    table = PipeTable(LOW)
    reached: dict[int, int] = {}
    for turn in range(40):
        node = turn * 7 % 11
        peer = NodeKey(bytes([node + 2]) * 32)
        generation = table.generation(authenticated(peer).peer)
        assert generation > reached.get(node, -1)
        reached[node] = generation
        core: PipeCore = table.admit(turn, authenticated(peer, generation)).core
        table.forget(core)
    assert len(table._generations) <= 3
