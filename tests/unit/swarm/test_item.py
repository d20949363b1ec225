"""A peer's record as a BEP 44 value."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey, PeerRecord, Span, spans_of
from torrentlm.swarm.item import MAX_BLOCKS, MAX_ITEM, decode_record, encode_record

NODE, MODEL = NodeKey(b"n" * 32), b"m" * 32

spans = st.sets(st.integers(0, MAX_BLOCKS - 1), max_size=60).map(spans_of)
names = st.text("abcdefgh-0123456789", max_size=40)
records = st.builds(
    PeerRecord,
    node=st.just(NODE),
    model=st.just(MODEL),
    port=st.integers(1, 65535),
    sequence=st.integers(0, 2**63 - 1),
    held=spans,
    resident=spans,
    claimed=spans,
    device=names,
    precision=names,
    memory_free=st.integers(0, 2**63 - 1),
    block_ms=st.floats(0, 1e9),
    sessions=st.integers(0, 2**31 - 1),
)


@given(records)
def test_round_trip(record: PeerRecord) -> None:
    data = encode_record(record)
    assert len(data) <= MAX_ITEM
    assert decode_record(NODE, MODEL, data) == record


def test_largest_record_fits() -> None:
    every = (Span(0, MAX_BLOCKS - 1),)
    record = PeerRecord(
        NODE, MODEL, 65535, 2**63 - 1, every, every, every, "d" * 40, "p" * 40, 2**63 - 1, 1e9 - 0.5, 2**31 - 1
    )
    assert len(encode_record(record)) <= MAX_ITEM
    assert decode_record(NODE, MODEL, encode_record(record)) == record


def test_usual_record_is_small() -> None:
    record = PeerRecord(NODE, MODEL, 7000, 3, (Span(0, 31),), (Span(0, 10),), device="cpu", memory_free=8 << 30)
    assert len(encode_record(record)) < 60


def test_block_beyond_the_bitmap_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        encode_record(PeerRecord(NODE, MODEL, 1, held=(Span(0, MAX_BLOCKS),)))


def test_fields_of_later_versions_are_ignored() -> None:
    record = PeerRecord(NODE, MODEL, 7000)
    fields = msgpack.unpackb(encode_record(record))
    assert decode_record(NODE, MODEL, msgpack.packb([*fields, "more"])) == record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 2),
        (1, 0),
        (1, 65536),
        (1, True),
        (1, "7000"),
        (2, -1),
        (3, [1]),
        (3, bytes(MAX_BLOCKS // 8 + 1)),
        (6, "x" * 41),
        (6, "line\nbreak"),
        (6, b"cpu"),
        (8, -1),
        (8, 2**63),
        (9, float("nan")),
        (9, float("inf")),
        (9, -1.0),
        (10, -1),
    ],
)
def test_fields_out_of_bounds_are_refused(field: int, value: object) -> None:
    fields = msgpack.unpackb(encode_record(PeerRecord(NODE, MODEL, 7000)))
    fields[field] = value
    with pytest.raises(RemoteProtocolError):
        decode_record(NODE, MODEL, msgpack.packb(fields))


@given(st.binary(max_size=1200))
def test_garbage_is_refused_or_bounded(data: bytes) -> None:
    try:
        record = decode_record(NODE, MODEL, data)
    except RemoteProtocolError:
        return
    assert decode_record(NODE, MODEL, encode_record(replace(record))) == record


@given(records, st.data())
def test_cut_short_is_refused(record: PeerRecord, data: st.DataObject) -> None:
    encoded = encode_record(record)
    with pytest.raises(RemoteProtocolError):
        decode_record(NODE, MODEL, encoded[: data.draw(st.integers(0, len(encoded) - 1))])
