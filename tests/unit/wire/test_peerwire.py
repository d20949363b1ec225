"""The demultiplexer of BEP 3 framing: however the stream is cut, what passes passes and what is taken is taken."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torrentlm.errors import RemoteProtocolError
from torrentlm.records import InfoHash
from torrentlm.wire.peerwire import (
    GREETING_BYTES,
    KEEP_ALIVE,
    MAX_MESSAGE,
    MAX_TAKEN,
    Demux,
    Greeting,
    Kind,
    Part,
    extended_message,
    port_message,
    signal_message,
)

FRAME_ID = 77


def message(code: int, payload: bytes = b"") -> bytes:
    return (1 + len(payload)).to_bytes(4, "big") + bytes([code]) + payload


def chunks(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    """``data`` cut into pieces of these sizes, the rest as the last one."""
    cut, position = [], 0
    for size in sizes:
        cut.append(data[position : position + size])
        position += size
    return [chunk for chunk in [*cut, data[position:]] if chunk]


def feed(demux: Demux, pieces: Iterable[bytes]) -> list[Part]:
    return [Part(part.kind, memoryview(bytes(part.data))) for piece in pieces for part in demux.feed(piece)]


def passed(parts: Iterable[Part]) -> bytes:
    return b"".join(part.data for part in parts if part.kind in (Kind.RUN, Kind.OPEN))


def taken(parts: Iterable[Part]) -> list[tuple[Kind, bytes]]:
    return [(part.kind, bytes(part.data)) for part in parts if part.kind not in (Kind.RUN, Kind.OPEN)]


def runs_end_at_messages(parts: Iterable[Part]) -> bool:
    """Wherever a RUN ends, the passed bytes so far are whole messages."""
    position, data = 0, b""
    for part in parts:
        if part.kind in (Kind.RUN, Kind.OPEN):
            data += bytes(part.data)
        if part.kind is not Kind.OPEN:
            while position < len(data):
                position += 4 + int.from_bytes(data[position : position + 4], "big")
            if position != len(data):
                return False
    return True


PASSING = st.one_of(
    st.just(KEEP_ALIVE),
    st.just(message(14)),
    st.builds(message, st.sampled_from([0, 1, 2, 3]), st.binary(min_size=1, max_size=60)),
    st.builds(message, st.just(4), st.binary(max_size=3)),
    st.builds(message, st.sampled_from([5, 6, 7, 8, 13, 15, 16, 21, 22, 23, 250]), st.binary(max_size=60)),
    st.builds(message, st.just(7), st.binary(min_size=16392, max_size=16392)),
    st.builds(extended_message, st.integers(1, 255).filter(lambda number: number != FRAME_ID), st.binary(max_size=60)),
    st.just(message(20)),
)
TAKEN = st.one_of(
    st.binary(max_size=300).map(lambda body: (Kind.FRAME, body, extended_message(FRAME_ID, body))),
    st.binary(max_size=300).map(lambda body: (Kind.HANDSHAKE, body, extended_message(0, body))),
    st.integers(0, 65535).map(lambda port: (Kind.PORT, port_message(port), port_message(port))),
    st.integers(0, 3).map(lambda code: (Kind.SIGNAL, signal_message(code), signal_message(code))),
    st.binary(min_size=4, max_size=4).map(lambda piece: (Kind.SIGNAL, message(4, piece), message(4, piece))),
)
STREAM = st.lists(st.one_of(PASSING, TAKEN), max_size=12)


def assemble(items: list[bytes | tuple[Kind, bytes, bytes]]) -> tuple[bytes, bytes, list[tuple[Kind, bytes]]]:
    """(the stream, what must pass, what must be taken)."""
    stream = b"".join(item if isinstance(item, bytes) else item[2] for item in items)
    passing = b"".join(item for item in items if isinstance(item, bytes))
    return stream, passing, [item[:2] for item in items if not isinstance(item, bytes)]


@given(STREAM, st.lists(st.integers(1, 20_000), max_size=20), st.sampled_from([None, 1, 1 << 16]))
def test_any_cut_gives_the_same(items: list[bytes | tuple[Kind, bytes, bytes]], sizes: list[int], run: int) -> None:
    stream, passing, expected = assemble(items)
    parts = feed(Demux(FRAME_ID, run=run), chunks(stream, sizes))
    assert passed(parts) == passing
    assert taken(parts) == expected
    if run is not None:
        assert runs_end_at_messages(parts)


@settings(max_examples=30)
@given(STREAM.filter(lambda items: sum(map(len, items)) < 3000))
def test_byte_by_byte(items: list[bytes | tuple[Kind, bytes, bytes]]) -> None:
    stream, passing, expected = assemble(items)
    parts = feed(Demux(FRAME_ID), (stream[at : at + 1] for at in range(len(stream))))
    assert (passed(parts), taken(parts)) == (passing, expected)
    assert runs_end_at_messages(parts)


@given(STREAM)
def test_taken_messages_keep_their_place(items: list[bytes | tuple[Kind, bytes, bytes]]) -> None:
    stream, _, _ = assemble(items)
    parts = feed(Demux(FRAME_ID), [stream])
    heads = {Kind.FRAME: FRAME_ID, Kind.HANDSHAKE: 0}
    again = b"".join(
        extended_message(heads[part.kind], bytes(part.data)) if part.kind in heads else bytes(part.data)
        for part in parts
    )
    assert again == stream


def test_runs_are_cut_between_messages() -> None:
    piece = message(7, bytes(16392))
    parts = Demux(run=1 << 16).feed(piece * 10 + piece[:100])
    assert [(part.kind, len(part.data)) for part in parts] == [
        (Kind.RUN, 4 * len(piece)),
        (Kind.RUN, 4 * len(piece)),
        (Kind.RUN, 2 * len(piece)),
        (Kind.OPEN, 100),
    ]


def test_without_cuts_a_chunk_is_one_part() -> None:
    piece = message(7, bytes(16392))
    assert len(Demux(FRAME_ID, run=None).feed(piece * 10 + piece[:100])) == 1


def test_passing_data_is_not_copied() -> None:
    data = message(7, bytes(16392))
    (part,) = Demux().feed(data)
    assert part.data.obj is data


def test_without_a_frame_id_frames_pass() -> None:
    frame = extended_message(FRAME_ID, b"frame")
    assert [(part.kind, bytes(part.data)) for part in Demux().feed(frame)] == [(Kind.RUN, frame)]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 6, 1000])
def test_a_message_beyond_the_limit_is_refused_at_its_head(cut: int) -> None:
    head = (MAX_MESSAGE + 1).to_bytes(4, "big") + b"\x07" + bytes(10)
    with pytest.raises(RemoteProtocolError):
        feed(Demux(FRAME_ID), chunks(head, [cut]))


@pytest.mark.parametrize("extension", [0, FRAME_ID])
@pytest.mark.parametrize("cut", [2, 6, 1000])
def test_a_taken_message_beyond_its_limit_is_refused_at_its_head(extension: int, cut: int) -> None:
    head = extended_message(extension, bytes(MAX_TAKEN - 5))[:20]
    with pytest.raises(RemoteProtocolError):
        feed(Demux(FRAME_ID), chunks(head, [cut]))


def test_the_longest_taken_message_is_taken() -> None:
    body = bytes(MAX_TAKEN - 6)
    assert taken(feed(Demux(FRAME_ID), [extended_message(FRAME_ID, body)])) == [(Kind.FRAME, body)]


def test_an_unfinished_message_is_not_held_in_memory() -> None:
    demux = Demux()
    head = MAX_MESSAGE.to_bytes(4, "big") + b"\x07"
    size = sum(len(part.data) for piece in (head, *[bytes(10_000)] * 50) for part in demux.feed(piece))
    assert size == len(head) + 500_000


GREETINGS = st.builds(
    Greeting,
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=20, max_size=20).map(InfoHash),
    st.binary(min_size=20, max_size=20),
)


@given(GREETINGS)
def test_greeting_round_trip(greeting: Greeting) -> None:
    data = greeting.to_bytes()
    assert len(data) == GREETING_BYTES
    assert Greeting.parse(data) == greeting
    other = greeting.naming(InfoHash(b"x" * 20))
    assert (other.reserved, other.info_hash, other.peer_id) == (greeting.reserved, b"x" * 20, greeting.peer_id)


@pytest.mark.parametrize("data", [b"", bytes(68), b"\x13BitTorrent protocol", b"\x13bitTorrent protocol" + bytes(48)])
def test_what_is_no_greeting(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Greeting.parse(data)
