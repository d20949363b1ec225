"""How a message becomes bytes: a small msgpack header, then raw tensor bytes, then a checksum.

    u16 header length | header | (zeros to a multiple of 8, tensor data) per tensor | xxh3-64 of all before,
    little-endian

The header is one msgpack array: the message's code, then its fields in the order of its class, each as its kind says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.wire.kinds import Struct, pack_fields, unpack_fields
from torrentlm.wire.tensors import CHECKSUM_SIZE, PayloadReader, PayloadWriter, aligned

MAX_HEADER = 16 << 10
HEADER_COST = 16
"""Credit for one header byte, on top of the byte itself: what Python objects take beyond their msgpack form."""


@dataclass(slots=True)
class EncodedMessage:
    """A message as the parts whose concatenation goes on the wire. ``extra``: credit that it costs beyond
    ``length``."""

    parts: list[memoryview]
    length: int
    extra: int


class Schema:
    """A set of message classes, each under its code. Encodes and decodes them; holds no state."""

    def __init__(self, messages: dict[int, type]) -> None:
        self.messages = messages
        self.structs = {record: Struct(record) for record in messages.values()}
        self._codes = {record: code for code, record in messages.items()}

    def encode(self, message: object) -> EncodedMessage:
        """Raise LocalProtocolError, naming the field, if the message breaks a bound."""
        record = type(message)
        code = self._codes.get(record)
        if code is None:
            raise LocalProtocolError(f"{record.__name__} is not a message")
        payload = PayloadWriter()
        try:
            header = msgpack.packb([code, *pack_fields(self.structs[record].fields, message, payload)])
        except (ValueError, OverflowError, TypeError) as error:
            raise LocalProtocolError(f"{record.__name__}: {error}") from error
        if len(header) > MAX_HEADER:
            raise LocalProtocolError(f"{record.__name__}: its header has {len(header)} bytes; {MAX_HEADER} are allowed")
        return _assemble(header, payload)

    def decode(self, data: bytes | bytearray | memoryview) -> tuple[Any, int]:
        """The message and the credit that it costs beyond its length. RemoteProtocolError if anything is not as it
        should be.

        Tensors are views of ``data``: they keep it alive, and are writable if it is.
        """
        view = memoryview(data)
        if len(view) < 2 + CHECKSUM_SIZE:
            raise RemoteProtocolError(f"a message of {len(view)} bytes is too short")
        if xxhash.xxh3_64_intdigest(view[:-CHECKSUM_SIZE]) != int.from_bytes(view[-CHECKSUM_SIZE:], "little"):
            raise RemoteProtocolError("a message does not match its checksum")
        end = 2 + int.from_bytes(view[:2])
        if end > min(2 + MAX_HEADER, len(view) - CHECKSUM_SIZE):
            raise RemoteProtocolError("a message's header is longer than allowed")
        raw = _unpack_header(view[2:end])
        record = self.messages.get(raw[0]) if type(raw) is tuple and raw and type(raw[0]) is int else None
        if record is None:
            raise RemoteProtocolError("a message has an unknown code")
        payload = PayloadReader(view, end)
        try:
            message = record(*unpack_fields(self.structs[record].fields, raw[1:], payload))
            payload.finish()
        except ValueError as error:
            raise RemoteProtocolError(f"{record.__name__}: {error}") from error
        return message, HEADER_COST * (end - 2) + payload.expansion


def _unpack_header(header: memoryview) -> Any:
    try:
        return msgpack.unpackb(header, use_list=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise RemoteProtocolError("a message's header is not msgpack") from error


def _assemble(header: bytes, payload: PayloadWriter) -> EncodedMessage:
    digest = xxhash.xxh3_64()
    position = 2 + len(header)
    head = len(header).to_bytes(2) + header
    parts: list[memoryview] = []
    for blob in payload.blobs:
        head += bytes(aligned(position) - position)
        position = aligned(position) + len(blob)
        parts += [memoryview(head), blob] if head else [blob]
        head = b""
    if head:
        parts.append(memoryview(head))
    for part in parts:
        digest.update(part)
    parts.append(memoryview(digest.intdigest().to_bytes(CHECKSUM_SIZE, "little")))
    extra = HEADER_COST * len(header) + payload.expansion
    return EncodedMessage(parts, position + CHECKSUM_SIZE, extra)
