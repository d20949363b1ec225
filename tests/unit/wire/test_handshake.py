from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.wire.frames import Ack, Proof, decode_frame, encode_frame
from torrentlm.wire.handshake import Authenticated, CarrierHandshake

from .nodes import Node

ALICE, BOB, MALLORY = Node(1), Node(2), Node(3)


def exchange(one: CarrierHandshake, other: CarrierHandshake) -> tuple[Authenticated | None, Authenticated | None]:
    moving = True
    while moving:
        moving = False
        for sender, receiver in ((one, other), (other, one)):
            if (frame := sender.next_frame()) is not None:
                receiver.receive_frame(frame)
                moving = True
    return one.result, other.result


def test_both_ends_learn_whom_they_speak_with() -> None:
    dialer = ALICE.carrier(dialer=True, generation=3)
    acceptor = BOB.carrier(dialer=False, generation=5)
    seen_by_dialer, seen_by_acceptor = exchange(dialer, acceptor)
    assert seen_by_dialer is not None
    assert seen_by_acceptor is not None
    assert (seen_by_dialer.peer.node, seen_by_acceptor.peer.node) == (BOB.node, ALICE.node)
    assert (seen_by_dialer.generation, seen_by_dialer.peer_generation) == (3, 5)
    assert (seen_by_acceptor.generation, seen_by_acceptor.peer_generation) == (5, 3)
    assert seen_by_dialer.peer.port == 6881
    assert seen_by_dialer.version == 1


def test_a_proof_does_not_fit_another_torrents_connection() -> None:
    with pytest.raises(RemoteProtocolError, match="signature"):
        exchange(ALICE.carrier(dialer=True), BOB.carrier(dialer=False, info_hash=bytes(20)))


def test_two_ends_that_both_dialed_do_not_agree() -> None:
    with pytest.raises(RemoteProtocolError, match="signature"):
        exchange(ALICE.carrier(dialer=True), BOB.carrier(dialer=True))


def recorded_proof(carrier: CarrierHandshake, hello: bytes) -> bytes:
    carrier.next_frame()
    carrier.receive_frame(hello)
    frame = carrier.next_frame()
    assert frame is not None
    return frame


def test_a_recorded_proof_does_not_fit_another_connection() -> None:
    old = recorded_proof(ALICE.carrier(dialer=True, nonce=1), BOB.carrier(dialer=False, nonce=2).next_frame() or b"")
    victim = BOB.carrier(dialer=False, nonce=3)
    victim.receive_frame(ALICE.carrier(dialer=True, nonce=1).next_frame() or b"")
    with pytest.raises(RemoteProtocolError, match="signature"):
        victim.receive_frame(old)


def test_a_proof_cannot_be_reflected() -> None:
    """Whoever sends our HELLO and PROOF back to us is not taken for us, whatever its role."""
    victim = ALICE.carrier(dialer=True)
    with pytest.raises(RemoteProtocolError, match="itself"):
        victim.receive_frame(victim.next_frame() or b"")
    assert victim.is_self
    mirror = ALICE.carrier(dialer=True, nonce=1)
    hello = BOB.carrier(dialer=False).next_frame() or b""
    proof = recorded_proof(mirror, hello)
    with pytest.raises(RemoteProtocolError, match="signature"):
        mirror.receive_frame(proof)


def test_a_borrowed_hello_is_of_no_use_without_its_key() -> None:
    victim = BOB.carrier(dialer=False)
    victim.receive_frame(ALICE.carrier(dialer=True).next_frame() or b"")
    forged = recorded_proof(MALLORY.carrier(dialer=True), victim.next_frame() or b"")
    with pytest.raises(RemoteProtocolError, match="signature"):
        victim.receive_frame(forged)
    assert victim.peer is not None  # claimed
    assert victim.result is None


def test_the_generation_is_signed() -> None:
    victim = BOB.carrier(dialer=False)
    dialer = ALICE.carrier(dialer=True)
    victim.receive_frame(dialer.next_frame() or b"")
    dialer.receive_frame(victim.next_frame() or b"")
    proof = decode_frame(dialer.next_frame() or b"")
    assert isinstance(proof, Proof)
    with pytest.raises(RemoteProtocolError, match="signature"):
        victim.receive_frame(encode_frame(Proof(proof.generation + 1, proof.signature)))


@pytest.mark.parametrize(("versions", "agreed"), [((1, 1), 1), ((4, 1), 1), ((9, 2), None)])
def test_versions_meet_at_the_highest_common_one(versions: tuple[int, int], agreed: int | None) -> None:
    newer = Node(4, version=versions[0], oldest=versions[1])
    if agreed is None:
        with pytest.raises(RemoteProtocolError, match="none of ours"):
            exchange(ALICE.carrier(dialer=True), newer.carrier(dialer=False))
    else:
        result, _ = exchange(ALICE.carrier(dialer=True), newer.carrier(dialer=False))
        assert result is not None
        assert result.version == agreed


def test_a_hello_that_has_grown_is_signed_whole() -> None:
    """A later version's HELLO has more at its end: both sign what was really sent."""
    dialer, acceptor = ALICE.carrier(dialer=True), BOB.carrier(dialer=False)
    acceptor.receive_frame((dialer.next_frame() or b"") + b"new")
    dialer.receive_frame(acceptor.next_frame() or b"")
    with pytest.raises(RemoteProtocolError, match="signature"):
        dialer.receive_frame(acceptor.next_frame() or b"")


@given(st.lists(st.binary(max_size=120), max_size=4))
def test_anything_else_fails(frames: list[bytes]) -> None:
    carrier = BOB.carrier(dialer=False)
    for frame in (*frames, encode_frame(Ack(0))):
        try:
            assert carrier.receive_frame(frame) is None
        except RemoteProtocolError:
            return
    pytest.fail("an ACK was taken during the handshake")


def test_a_frame_after_the_handshake_belongs_to_the_pipe() -> None:
    dialer, acceptor = ALICE.carrier(dialer=True), BOB.carrier(dialer=False)
    exchange(dialer, acceptor)
    with pytest.raises(LocalProtocolError):
        dialer.receive_frame(encode_frame(Ack(0)))
