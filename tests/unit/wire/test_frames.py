from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey
from torrentlm.wire import frames
from torrentlm.wire.frames import Data, Hello, decode_frame, encode_data, encode_frame

from .strategies import control_frames, fixed_frames, hellos, streams, u32


@given(control_frames)
def test_every_frame_but_data_survives_the_wire(frame: frames.Hello) -> None:
    assert decode_frame(encode_frame(frame)) == frame
    assert decode_frame(memoryview(encode_frame(frame))) == frame


@given(u32, u32, streams, st.binary(min_size=1, max_size=300), st.booleans(), st.booleans(), st.data())
def test_data_survives_the_wire(
    seq: int, ack: int, stream: int, body: bytes, first: bool, end: bool, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(body)))
    length = data.draw(st.integers(len(body) + 1, 2**32 - 1))
    parts = [memoryview(body)[:cut], memoryview(body)[cut:]]
    frame = decode_frame(encode_data(seq, ack, stream, parts, first=first, end=end, length=length))
    assert isinstance(frame, Data)
    assert (frame.seq, frame.ack, frame.stream, frame.first, frame.end) == (seq, ack, stream, first, end)
    assert frame.body == body
    assert frame.length == (0 if not first else len(body) if end else length)


@given(fixed_frames, st.binary(min_size=1, max_size=9))
def test_a_fixed_frame_has_exactly_its_length(frame: frames.FixedFrame, more: bytes) -> None:
    data = encode_frame(frame)
    for wrong in (data + more, *(data[:size] for size in range(len(data)))):
        with pytest.raises(RemoteProtocolError):
            decode_frame(wrong)


@given(hellos, st.binary(max_size=200))
def test_a_hello_may_grow_at_its_end_but_not_end_early(hello: Hello, more: bytes) -> None:
    data = encode_frame(hello)
    assert decode_frame(data + more) == hello
    for size in range(1, len(data)):
        with pytest.raises(RemoteProtocolError):
            decode_frame(data[:size])
    with pytest.raises(RemoteProtocolError):
        decode_frame(data + bytes(frames.MAX_HELLO))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_frame_or_a_remote_protocol_error(data: bytes) -> None:
    try:
        frame = decode_frame(data)
    except RemoteProtocolError:
        return
    if not isinstance(frame, Data | Hello):  # a HELLO's unknown end is not kept
        assert encode_frame(frame) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(frames.MAX_FRAME + 1),
        b"\x00",  # no type 0
        b"\x0b" + bytes(20),  # a type after the last
        b"\x57" + bytes(4),  # an ACK with flags
        b"\x44" + bytes(30),  # DATA with an unknown flag
        b"\x04" + bytes(10),  # DATA without a body
        b"\x14" + bytes(8) + b"\0\0" + b"\0\0\0\x05" + bytes(5),  # "more to come" of a message that is all there
        b"\x24" + bytes(8) + b"\0\x80" + b"x",  # stream 128
        b"\x05" + bytes(8) + b"\0\x80" + bytes(4),
        b"\x06" + bytes(8) + b"\0\x80",
        b"\x0a",
        b"\x0a\x00\xff",  # not UTF-8
        b"\x0a\x00" + b"x" * 256,
        b"\x01\x01\x02" + bytes(76),  # oldest version above the newest
        b"\x01\x00\x00" + bytes(76),  # version 0
    ],
)
def test_what_the_protocol_does_not_allow(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_frame(data)


@pytest.mark.parametrize(
    "frame",
    [
        frames.Ack(2**32),
        frames.Ack(-1),
        frames.Bye(256),
        Hello(NodeKey(bytes(31)), bytes(32), bytes(8)),
        Hello(NodeKey(bytes(32)), bytes(32), bytes(8), port=65536),
    ],
)
def test_our_own_mistakes_are_local(frame: frames.Ack) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(frame)


def test_texts_are_cut_between_characters() -> None:
    assert decode_frame(encode_frame(frames.Bye(0, "é" * 200))) == frames.Bye(0, "é" * 127)


def test_the_largest_data_frame_fits_64_kib_on_the_connection() -> None:
    body = [memoryview(bytes(frames.MAX_BODY))]
    data = encode_data(0, 0, 0, body, first=True, end=True)
    assert len(data) + frames.BEP3_OVERHEAD == 65536
    assert isinstance(decode_frame(data), Data)
