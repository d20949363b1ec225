"""A peer's record as a BEP 44 mutable item: at most 1000 bytes, under the node's key, salted with the model's hash.

    msgpack [1, port, sequence, held, resident, claimed, device, precision, memory_free, block_ms, sessions]

Blocks are bitmaps: bit 0 (the most significant of the first byte) is block 0, as in BEP 3's bitfield; zero bytes at the
end are left out. Node and model are not repeated: they are the item's key and salt.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey, PeerRecord, Span, spans_of

MAX_ITEM = 1000 - len("1000:")
"""Bytes of a value that BEP 44 lets through, less what bencoding a string adds."""
MAX_BLOCKS = 2048
_VERSION = 1
_FIELDS = 11
_MAX_TEXT = 40


def salt_of(model: bytes) -> bytes:
    """The salt under which a node's record for the model torrent with this v2 info-hash (32 bytes) is found."""
    return model


def encode_record(record: PeerRecord) -> bytes:
    """The item's value; raises LocalProtocolError for a record that does not fit."""
    spans = (record.held, record.resident, record.claimed)
    if any(span.last >= MAX_BLOCKS for group in spans for span in group):
        raise LocalProtocolError(f"a record names a block beyond the {MAX_BLOCKS} that an item can carry")
    fields = [
        _VERSION,
        record.port,
        record.sequence,
        *map(_bitmap, spans),
        record.device[:_MAX_TEXT],
        record.precision[:_MAX_TEXT],
        record.memory_free,
        record.block_ms,
        record.sessions,
    ]
    data: bytes = msgpack.packb(fields)
    if len(data) > MAX_ITEM:
        raise LocalProtocolError(f"a record of {len(data)} bytes does not fit an item of {MAX_ITEM}")
    return data


def decode_record(node: NodeKey, model: bytes, data: bytes) -> PeerRecord:
    """Read what a stranger stored under ``node``'s key; raises RemoteProtocolError unless every field is in bounds."""
    try:
        port, sequence, held, resident, claimed, device, precision, memory_free, block_ms, sessions = _unpack(data)
        return PeerRecord(
            node=node,
            model=model,
            port=_integer(port, 1, 0xFFFF),
            sequence=_integer(sequence, 0, 2**63 - 1),
            held=_spans(held),
            resident=_spans(resident),
            claimed=_spans(claimed),
            device=_text(device),
            precision=_text(precision),
            memory_free=_integer(memory_free, 0, 2**63 - 1),
            block_ms=_milliseconds(block_ms),
            sessions=_integer(sessions, 0, 2**31 - 1),
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"the record of node {node.hex()[:16]} is malformed ({error})") from error


def _unpack(data: bytes) -> list[Any]:
    """The fields after the version; later versions may append to them."""
    if len(data) > MAX_ITEM:
        raise ValueError(f"{len(data)} bytes")
    fields = msgpack.unpackb(data, raw=False)
    if not isinstance(fields, list) or len(fields) < _FIELDS or fields[0] != _VERSION:
        raise ValueError("another version")
    return fields[1:_FIELDS]


def _bitmap(spans: tuple[Span, ...]) -> bytes:
    bits = bytearray(max((span.last // 8 + 1 for span in spans), default=0))
    for span in spans:
        for block in span:
            bits[block // 8] |= 0x80 >> block % 8
    return bytes(bits)


def _spans(bitmap: Any) -> tuple[Span, ...]:
    if not isinstance(bitmap, bytes) or len(bitmap) * 8 > MAX_BLOCKS:
        raise ValueError("blocks")
    return spans_of(8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte & 0x80 >> bit)


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError("a number out of range")
    return value


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 1e9:
        raise ValueError("a time out of range")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError("a name")
    return value
