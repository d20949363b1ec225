from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import random
import struct
from typing import Any

import msgpack
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import MAX_LANES, Lane, NodeKey, PeerRecord, Sampling, SessionId, Span, Stop
from torrentlm.wire import tensors as tensors_module
from torrentlm.wire.codec import MAX_HEADER
from torrentlm.wire.messages import (
    FAIL_CODES,
    SCHEMA,
    Close,
    Contact,
    Encoded,
    Fail,
    Generate,
    Halt,
    Message,
    NextHop,
    Open,
    Peers,
    Record,
    Renew,
    Step,
    Token,
    Want,
    decode_message,
    decode_record,
    encode_message,
    encode_record,
)
from torrentlm.wire.tensors import MAX_EXPANDED, Tensor

from .strategies import messages, of_kind, of_message, tensors

SESSION = SessionId(bytes(range(16)))
NODE = NodeKey(bytes(32))
OPEN = Open(SESSION, 0, bytes(32), 0, 1, (), None, 1, 1, 1)


def encoded(message: Message) -> bytes:
    return b"".join(encode_message(message).parts)


def sealed(header: Any, payload: bytes = b"") -> bytes:
    """A message with a right checksum around whatever we like."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    body = struct.pack(">H", len(packed)) + packed + payload
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def step(*given: Tensor, **changes: Any) -> Step:
    return dataclasses.replace(Step(SESSION, 1, 0, 0, Want.NONE, None, given, 1), **changes)


@pytest.mark.parametrize("record", SCHEMA.structs, ids=lambda record: record.__name__)
def test_every_message_survives_the_wire(record: type) -> None:
    @settings(max_examples=40)
    @given(of_message(record))
    def check(message: Message) -> None:
        parts = encode_message(message)
        data = bytearray(b"".join(parts.parts))
        assert parts.length == len(data)
        decoded, extra = decode_message(data)
        assert decoded == message
        assert type(decoded) is type(message)
        assert extra == parts.extra  # both ends charge the same credit

    check()


@given(messages, st.binary(min_size=1, max_size=20), st.data())
def test_longer_shorter_or_changed_is_refused(message: Message, more: bytes, data: st.DataObject) -> None:
    good = encoded(message)
    cut = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    for bad in (good + more, good[:cut], bytes(flipped)):
        with pytest.raises(RemoteProtocolError):
            decode_message(bad)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_under_a_right_checksum_never_crash(body: bytes) -> None:
    for data in (body, sealed(body)):
        with contextlib.suppress(RemoteProtocolError):
            decode_message(data)


@given(messages, st.data())
def test_a_field_of_another_type_never_crashes(message: Message, data: st.DataObject) -> None:
    """Well-formed msgpack and a right checksum, but one field holds something else."""
    good = encoded(message)
    size = int.from_bytes(good[:2])
    header = msgpack.unpackb(good[2 : 2 + size])
    odd = st.none() | st.booleans() | st.integers(-1, 2**64 - 1) | st.floats() | st.text(max_size=3) | st.just([[[]]])
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(odd)
    packed = msgpack.packb(header)
    payload_start = tensors_module.aligned(2 + size)
    payload = good[payload_start:-8] and bytes(-(2 + len(packed)) % 8) + good[payload_start:-8]
    with contextlib.suppress(RemoteProtocolError):
        decode_message(sealed(packed, payload))


@pytest.mark.parametrize(
    "message",
    [
        Halt(SessionId(bytes(15)), 0),
        Halt(SESSION, -1),
        Halt(SESSION, 2**32),
        Halt(SESSION, True),
        Halt(SESSION, 1.0),  # type: ignore[arg-type]
        Close(bytearray(16)),  # type: ignore[arg-type]
        Renew((SESSION,) * 257),
        Renew([SESSION]),  # type: ignore[arg-type]
        Peers((Contact(NODE, "x" * 256, 1),)),
        Peers((Contact(NODE, "host", 0),)),
        Peers((NODE,)),  # type: ignore[arg-type]
        Token(SESSION, 0, 0, 0, (-1,)),
        Token(SESSION, 0, 0, 0, (1,), "bored"),
        Fail(SESSION, 0, "bad_luck", ""),
        Fail(SESSION, 0, "busy", "é" * 300),
        Fail(SESSION, 0, "busy", "\ud800"),
        Generate(SESSION, 0, 0, 0),
        Generate(SESSION, 0, 0, 1, sampling=Sampling(temperature=-1.0)),
        Generate(SESSION, 0, 0, 1, sampling=Sampling(top_p=float("nan"))),
        Generate(SESSION, 0, 0, 1, sampling=Sampling(seed=2**64)),
        Generate(SESSION, 0, 0, 1, stop=Stop(strings=("x" * 257,))),
        Generate(SESSION, 0, 0, 1, stop=Stop(strings=("x",) * 17)),
        Generate(SESSION, 0, 0, 1, stop=Stop(tokens=(1,) * 65)),
        step(want=9),
        step(reorder=(256,)),
        step(tokens=-1),
        step(tokens=2**24),
        step(tokens=None),
        dataclasses.replace(OPEN, pads=(2**24,)),
        dataclasses.replace(OPEN, pads=(-(2**24),)),
        dataclasses.replace(OPEN, source=-1),
        dataclasses.replace(OPEN, source=2**24),
        Encoded(SESSION, (Tensor("U8", (0,), b""),) * 65),
        Encoded(SESSION, [Tensor("U8", (0,), b"")]),  # type: ignore[arg-type]
        step(Tensor("F128", (), b"")),
        step(Tensor("F32", (2,), bytes(7))),
        step(Tensor("F32", (-1,), b"")),
        step(Tensor("F32", (1.0,), bytes(4))),  # type: ignore[arg-type]
        step(Tensor("U8", (1,) * 9, b"x")),
        step(*[Tensor("U8", (0,), b"")] * 65),
        Record(PeerRecord(NODE, bytes(32), 65536)),
        Record(PeerRecord(NODE, bytes(31), 1)),
        Record(PeerRecord(NODE, bytes(32), 1, held=(Span(0, 65536),))),
        Record(PeerRecord(NODE, bytes(32), 1, held=(Span(0, 1),) * 257)),
        Record(PeerRecord(NODE, bytes(32), 1, lanes=(Lane(Span(0, 1)),) * (MAX_LANES + 1))),
        NextHop(NODE, "host", 1, SESSION),
    ],
    ids=repr,
)
def test_a_message_out_of_bounds_is_our_mistake(message: Any) -> None:
    with pytest.raises(LocalProtocolError):
        encode_message(message)


def test_the_error_names_the_field() -> None:
    with pytest.raises(LocalProtocolError, match="Generate: sampling top_p is nan, not a number from 0 to 1"):
        encode_message(Generate(SESSION, 0, 0, 1, sampling=Sampling(top_p=float("nan"))))
    with pytest.raises(RemoteProtocolError, match="Halt: epoch is -1, not an integer"):
        decode_message(sealed([9, SESSION, -1]))


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(10),
        sealed(b""),
        sealed([]),
        sealed({}),
        sealed([99]),
        sealed([True, SESSION]),
        sealed([[9], SESSION, 1]),
        sealed([9, SESSION]),
        sealed([9, SESSION, 1, 1]),
        sealed([9, SESSION, 2**32]),
        sealed([9, SESSION, False]),
        sealed([9, SESSION, 1], b"\0"),  # bytes that belong to no tensor
        sealed(msgpack.packb([9, SESSION, 1]) + b"\0"),
        sealed(b"\xdd\xff\xff\xff\xff"),  # four billion items announced
        sealed(b"\xc6\xff\xff\xff\xff"),
        sealed(nested(3000)),
        sealed([9, SESSION, msgpack.Timestamp(1)]),
        sealed([9, SESSION, msgpack.ExtType(5, b"x")]),
        sealed(b"\x93\x0c\xa1\xff\xc0"),  # not UTF-8
        sealed([9, SESSION, 1] + [None] * MAX_HEADER),
        sealed([3, SESSION, 1, bytes(32), 5, 4, [], None, 1, 1, 1, [], 0]),  # blocks 5 to 4
        sealed([3, SESSION, 1, bytes(32), 1, 4, [], None, 2, 1, 1, [0], 0]),  # one pad for two rows
        sealed([1, [NODE, bytes(32), 1, 0, [[2, 1]], [], [], "cpu", "F32", 0, 0.0, 0]]),  # a span backwards
    ],
)
def test_hostile_messages_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(data)


def tensor_message(*entries: Any, payload: bytes = b"") -> bytes:
    header = msgpack.packb([8, SESSION, 0, 0, list(entries)])
    return sealed(header, bytes(-(2 + len(header)) % 8) + payload)


def compressed(size: int, **parameters: Any) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(bytes(size))


@pytest.mark.parametrize(
    "data",
    [
        tensor_message([1, 9], payload=bytes(8)),  # less than the shape says
        tensor_message([1, 8], payload=bytes(9)),  # more
        tensor_message([1, 8]),
        tensor_message([15, 8], payload=bytes(8)),  # no such dtype
        tensor_message([-1, 8], payload=bytes(8)),
        tensor_message([1, -8], payload=bytes(8)),
        tensor_message([1, True], payload=bytes(1)),
        tensor_message([1, 2**31 - 1, 2**31 - 1, 2**31 - 1], payload=bytes(8)),
        tensor_message([1, *[1] * 9], payload=bytes(1)),
        tensor_message([], payload=b""),
        tensor_message([17]),
        tensor_message([17, -4, 8], payload=bytes(8)),
        tensor_message([17, len(compressed(100)), 99], payload=compressed(100)),
        tensor_message([17, len(compressed(100)), 101], payload=compressed(100)),
        tensor_message([17, 2 * len(compressed(100)), 100], payload=2 * compressed(100)),
        tensor_message([17, 8, 100], payload=b"no zstd!"),
        tensor_message(
            [17, len(compressed(100, write_content_size=False)), 100],
            payload=compressed(100, write_content_size=False),
        ),
        tensor_message([17, len(compressed(MAX_EXPANDED + 1)), MAX_EXPANDED + 1], payload=compressed(MAX_EXPANDED + 1)),
    ],
)
def test_tensors_that_are_not_what_their_entry_says(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(data)


def test_a_decompression_bomb_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = compressed(1 << 28)
    monkeypatch.setattr(tensors_module.zstandard, "ZstdDecompressor", None)
    with pytest.raises(RemoteProtocolError, match="expands"):
        decode_message(tensor_message([17, len(bomb), 1 << 28], payload=bomb))
    with pytest.raises(RemoteProtocolError, match="true size"):
        decode_message(tensor_message([17, len(bomb), 100], payload=bomb))


def test_ids_and_masks_are_compressed_where_it_pays_and_floats_never() -> None:
    ids = Tensor("I64", (1, 512), struct.pack("<512q", *random.Random(0).choices(range(50000), k=512)))
    mask = Tensor("BOOL", (1, 4096), bytes(4096))
    floats = Tensor("F32", (1024,), bytes(4096))
    noise = Tensor("I8", (4096,), random.Random(0).randbytes(4096))
    short = Tensor("U8", (511,), bytes(511))
    assert encode_message(step(ids)).length < 4096 * 0.45
    assert encode_message(step(mask)).length < 200
    for tensor in (floats, noise, short):
        assert encode_message(step(tensor)).length > tensor.nbytes
    message = step(ids, floats, mask, noise, short)
    assert decode_message(encoded(message))[0] == message


def test_large_masks_travel_uncompressed_so_that_their_size_is_paid_for() -> None:
    half = Tensor("BOOL", (MAX_EXPANDED // 2 + 1,), bytes(MAX_EXPANDED // 2 + 1))
    assert MAX_EXPANDED // 2 < encode_message(step(half, half)).length < MAX_EXPANDED
    assert encode_message(step(half)).extra > half.nbytes


@given(st.lists(tensors(), max_size=5))
def test_tensors_arrive_as_aligned_writable_memory(given: list[Tensor]) -> None:
    message, _ = decode_message(bytearray(encoded(step(*given))))
    assert isinstance(message, Step)
    for tensor in message.tensors:
        if tensor.nbytes:
            assert ctypes.addressof(ctypes.c_char.from_buffer(tensor.data)) % 8 == 0  # fails if it is read-only


def test_data_of_any_layout_and_type_is_taken_by_its_bytes() -> None:
    values = memoryview(struct.pack("<6f", *range(6))).cast("f", (2, 3))
    message, _ = decode_message(encoded(step(Tensor("F32", (2, 3), values), Tensor("F32", (0, 3), b""))))
    assert isinstance(message, Step)
    assert bytes(message.tensors[0].data) == bytes(values)


def test_a_record_stands_alone_within_a_dht_item() -> None:
    record = PeerRecord(
        NODE, bytes(32), 6881, 2**40, (Span(0, 31),), (Span(0, 10),), (Span(4, 9),), "cuda:0", "BF16", 2**36, 3.7, 4
    )
    data = encode_record(record)
    assert decode_record(data) == record
    assert len(data) < 200
    with pytest.raises(RemoteProtocolError):
        decode_record(encoded(Close(SESSION)))


@given(of_kind(SCHEMA.structs[Record]))
def test_any_record_stands_alone(message: Record) -> None:
    assert decode_record(encode_record(message.record)) == message.record


def test_numbers_of_dtypes_and_fail_codes_are_part_of_the_protocol() -> None:
    """Reordering either table changes the wire: raise the version and docs/protocol.md along with this test."""
    dtypes = "BOOL U8 I8 I16 U16 I32 U32 I64 U64 F16 BF16 F32 F64 F8_E4M3 F8_E5M2"
    assert " ".join(tensors_module.ITEM_SIZES) == dtypes
    messages = (
        "Record Peers Open Opened Generate Step Token Output Halt Renew Close Fail Encoded AskSidecar SidecarBytes"
    )
    assert " ".join(record.__name__ for _, record in sorted(SCHEMA.messages.items())) == messages
    assert len(FAIL_CODES) == 10


def test_the_smallest_header_lists_fit() -> None:
    """The bounds of single fields never add up to more than a header may have."""
    full = [
        Renew((SESSION,) * 256),
        Peers((Contact(NODE, "h" * 255, 65535),) * 32),
        Open(
            SESSION,
            2**32 - 1,
            bytes(32),
            0,
            1,
            (NODE,) * 16,
            NextHop(NODE, "h" * 255, 1, SESSION),
            256,
            1,
            1,
            (1 - 2**24,) * 256,
            2**24 - 1,
        ),
        step(*[Tensor("F32", (2**24, 0, 2**24, 2**24, 2**24, 2**24, 2**24, 2**24), b"")] * 64, reorder=(255,) * 256),
        Generate(SESSION, 0, 0, 1, stop=Stop((2**31 - 1,) * 64, ("s" * 256,) * 16)),
        Record(
            PeerRecord(
                NODE,
                bytes(32),
                1,
                0,
                *[(Span(60000, 65000),) * 256] * 3,
                device="d" * 64,
                offered=(Span(60000, 65000),) * 256,
                fetching=(Span(60000, 65000),) * 256,
                lanes=(Lane(Span(60000, 65000), "d" * 64, "p" * 16, 1e6, 65535),) * MAX_LANES,
            )
        ),
        Token(SESSION, 0, 0, 0, (2**31 - 1,) * 256),
    ]
    for message in full:
        assert decode_message(encoded(message))[0] == message
