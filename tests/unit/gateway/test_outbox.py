"""What leaves, in which order, and where frames may stand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.gateway.fakes import piece
from torrentlm.gateway.outbox import HOLD_BYTES, Buffers, Outbox
from torrentlm.wire.peerwire import UNCHOKE, Demux, Kind, Part, extended_message, signal_message

FRAME = extended_message(9, b"frame")


class Frames:
    def __init__(self) -> None:
        self.waiting = 0

    def __call__(self, budget: int) -> Buffers:
        taken, self.waiting = self.waiting, 0
        return [FRAME] * taken


def outbox() -> tuple[Outbox, Frames]:
    frames = Frames()
    box = Outbox(frames)
    box.put(Part(Kind.RUN, memoryview(extended_message(0, b"offer"))), offers=True)
    box.next_batch(1)
    return box, frames


def put(box: Outbox, demux: Demux, data: bytes) -> None:
    for part in demux.feed(data):
        box.put(part)


def drain(box: Outbox, limit: int = 1 << 16) -> bytes:
    data = b""
    while batch := box.next_batch(limit):
        data += b"".join(batch)
    return data


def test_frames_go_before_what_waits() -> None:
    box, frames = outbox()
    first, second = piece(), piece()
    put(box, Demux(run=1), first + second)
    frames.waiting = 1
    assert drain(box) == FRAME + first + second


def test_no_frame_before_the_offer() -> None:
    frames = Frames()
    box = Outbox(frames)
    frames.waiting = 1
    bitfield, offer = Part(Kind.RUN, memoryview(b"\0\0\0\1\5")), Part(Kind.RUN, memoryview(extended_message(0, b"")))
    box.put(bitfield)
    assert drain(box) == bytes(bitfield.data)
    box.put(offer, offers=True)
    box.put(bitfield)
    assert box.next_batch(1) == [offer.data]
    assert box.next_batch(1) == [FRAME, bitfield.data]


def test_an_unfinished_message_is_held_back() -> None:
    box, frames = outbox()
    data = piece()
    demux = Demux()
    put(box, demux, data[:5000])
    put(box, demux, data[5000:9000])
    assert drain(box) == b""
    frames.waiting = 1
    assert drain(box) == FRAME
    put(box, demux, data[9000:])
    assert drain(box) == data
    assert box.waiting == 0


def test_a_long_message_is_let_out_in_parts_and_frames_wait_for_its_end() -> None:
    box, frames = outbox()
    data = piece(HOLD_BYTES * 2)
    demux = Demux()
    put(box, demux, data[: HOLD_BYTES + 1])
    assert drain(box) == data[: HOLD_BYTES + 1]
    assert box.midway
    frames.waiting = 1
    assert drain(box) == b""
    put(box, demux, data[HOLD_BYTES + 1 :])
    assert drain(box) == data[HOLD_BYTES + 1 :] + FRAME
    assert not box.midway


def test_clear_forgets_what_waits() -> None:
    box, frames = outbox()
    put(box, Demux(), piece() + piece()[:100])
    box.clear()
    frames.waiting = 1
    assert (drain(box), box.waiting) == (FRAME, 0)


@given(
    st.lists(st.sampled_from([0, 13, 16384, 60_000, 100_000]), max_size=8),
    st.lists(st.integers(1, 50_000), min_size=1, max_size=30),
    st.lists(st.booleans(), min_size=30, max_size=30),
    st.sampled_from([1, 20_000, 1 << 16]),
)
def test_whatever_the_chunks_messages_stay_whole(
    sizes: list[int], cuts: list[int], frame_at: list[bool], limit: int
) -> None:
    messages = [piece(size) for size in sizes]
    stream = b"".join(messages)
    box, frames = outbox()
    demux, position, sent = Demux(), 0, b""
    for cut, with_frame in zip(cuts, frame_at, strict=False):
        put(box, demux, stream[position : position + cut])
        position += cut
        frames.waiting += with_frame
        sent += drain(box, limit)
    put(box, demux, stream[position:])
    sent += drain(box, limit)
    assert box.waiting == 0
    parts = Demux(9).feed(sent)
    assert b"".join(part.data for part in parts if part.kind is not Kind.FRAME) == stream
    assert sum(part.kind is Kind.FRAME for part in parts) == sum(frame_at[: len(cuts)])


@given(st.lists(st.integers(1, 40_000), max_size=30), st.sets(st.integers(0, 30)), st.booleans())
def test_what_is_put_in_stands_between_messages(sizes: list[int], at: set[int], drained: bool) -> None:
    box, _ = outbox()
    demux, stream, position, sent = Demux(), piece(60_000) + piece(9) + piece(16_384), 0, b""
    for number, size in enumerate([*sizes, len(stream)]):
        put(box, demux, stream[position : position + size])
        position += size
        if number in at:
            box.put_between(Part(Kind.RUN, memoryview(signal_message(UNCHOKE))))
        if drained:
            sent += drain(box)
    sent += drain(box)
    parts = Demux().feed(sent)
    assert b"".join(part.data for part in parts if part.kind is not Kind.SIGNAL) == stream
    assert sum(part.kind is Kind.SIGNAL for part in parts) == sum(number <= len(sizes) for number in at)
    assert not box.waiting
