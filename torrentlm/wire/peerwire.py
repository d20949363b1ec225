"""BEP 3 as far as the gateway needs it: the greeting, and where one message ends and the next begins.

Theory of operation: after the greeting a connection is a row of messages, ``<u32 length><u8 id>...``. Nearly all of
them are passed on unread, in runs as long as possible. Only four kinds are taken out whole: the extended handshake
(BEP 10, id 20 with extension 0), extended messages with our own extension id, PORT (BEP 5, id 9), and the short ones
that say who is choked or interested or has a piece (BEP 3, ids 0 to 4). :class:`Demux` finds them; it never copies what
passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from struct import Struct
from typing import NamedTuple

from torrentlm.errors import RemoteProtocolError
from torrentlm.records import InfoHash

PROTOCOL = b"\x13BitTorrent protocol"
GREETING_BYTES = 68

MAX_MESSAGE = 1 << 20
"""Longest message that is passed through (the same limit as libtorrent's): pieces, bitfields and BEP 52 hashes fit."""

MAX_TAKEN = 1 << 16
"""Longest message that is taken out of the stream, with its length prefix."""

RUN_BYTES = 1 << 16
"""Usual length of a run."""

CHOKE, UNCHOKE, INTERESTED, NOT_INTERESTED, HAVE, PORT, EXTENDED = 0, 1, 2, 3, 4, 9, 20
KEEP_ALIVE = b"\0\0\0\0"

_PERHAPS_TAKEN = frozenset((CHOKE, UNCHOKE, INTERESTED, NOT_INTERESTED, HAVE, PORT, EXTENDED))
_SIGNAL_BYTES = 5
_HEAD = Struct(">IBB")
_LENGTH = Struct(">I")


@dataclass(frozen=True, slots=True)
class Greeting:
    """The 68 bytes that open a connection: reserved bits, info-hash, peer id."""

    reserved: bytes
    info_hash: InfoHash
    peer_id: bytes

    @classmethod
    def parse(cls, data: bytes) -> Greeting:
        """Raise :exc:`RemoteProtocolError` unless ``data`` is exactly one BEP 3 greeting."""
        if len(data) != GREETING_BYTES or not data.startswith(PROTOCOL):
            raise RemoteProtocolError("the peer does not speak plain BitTorrent")
        return cls(data[20:28], InfoHash(data[28:48]), data[48:68])

    def to_bytes(self) -> bytes:
        return PROTOCOL + self.reserved + self.info_hash + self.peer_id

    def naming(self, info_hash: InfoHash) -> Greeting:
        """The same greeting with another name for the torrent."""
        return replace(self, info_hash=info_hash)

    @property
    def extended(self) -> bool:
        """BEP 10: extended messages are understood."""
        return bool(self.reserved[5] & 0x10)

    @property
    def dht(self) -> bool:
        """BEP 5: a PORT message may follow."""
        return bool(self.reserved[7] & 0x01)

    @property
    def v2(self) -> bool:
        """BEP 52: may be answered with the truncated v2 info-hash."""
        return bool(self.reserved[7] & 0x10)


class Kind(Enum):
    """What a :class:`Part` is. ``OPEN`` is ``RUN`` whose last message goes on in the next part."""

    RUN = 1
    OPEN = 2
    HANDSHAKE = 3
    FRAME = 4
    PORT = 5
    SIGNAL = 6


class Part(NamedTuple):
    """A stretch of the stream.

    ``HANDSHAKE`` and ``FRAME`` carry the payload behind the extension id, ``PORT`` the whole message, as does
    ``SIGNAL``: choke, unchoke, interested, not interested or have.
    """

    kind: Kind
    data: memoryview


class Demux:
    """Cuts what arrives on one direction of a connection, behind the greeting, into parts.

    ``frame_id`` is the extension id of our own messages in this direction (None: there are none to look for). Runs are
    cut at the first message boundary behind ``run`` bytes, so that something may go in between; with None there are no
    boundaries to be had: what passes comes in parts as long as possible, all called OPEN.
    """

    def __init__(self, frame_id: int | None = None, run: int | None = RUN_BYTES) -> None:
        self.frame_id = frame_id
        self._run = run or 1 << 62
        self._cut = run is not None
        self._left = 0  # bytes of a passing message that are still to come
        self._held = bytearray()  # the head of a message, or as much of a taken message as has come

    def feed(self, data: bytes) -> list[Part]:
        """Return the parts that ``data`` completes, in order.

        Raise :exc:`RemoteProtocolError` on a length out of bounds.
        """
        parts: list[Part] = []
        view, end = memoryview(data), len(data)
        start = self._finish_held(view, parts) if self._held else 0  # first byte not yet given out
        position = start + self._left  # where the next message begins, perhaps behind the end
        boundary = position if position <= end else start  # end of the last whole message
        head, last = _HEAD.unpack_from, end - _HEAD.size
        while position <= last:
            length, code, extension = head(data, position)
            if length > MAX_MESSAGE:
                raise RemoteProtocolError(f"the peer announced a message of {length} bytes")
            after = position + 4 + length
            if code in _PERHAPS_TAKEN and (kind := self._taken(length, code, extension)) is not None:
                if start < position:
                    parts.append(Part(Kind.RUN, view[start:position]))
                start = boundary = position
                if after > end:
                    break
                parts.append(_taken_part(kind, view[position:after]))
                start = boundary = position = after
                continue
            position = after
            if position <= end:
                boundary = position
                if boundary - start >= self._run:
                    parts.append(Part(Kind.RUN, view[start:boundary]))
                    start = boundary
        self._left = max(0, position - end)
        passed = end if self._left else position  # what is behind it is the head of a message, or a part of a taken one
        self._give_out(view, start, boundary, passed, parts)
        if passed < end:
            self._held += view[passed:]
            self._flush_short(parts)
        return parts

    def _give_out(self, view: memoryview, start: int, boundary: int, passed: int, parts: list[Part]) -> None:
        """What passes at the end of a chunk: the last whole messages, and as much as has come of the next."""
        if self._cut and start < boundary:
            parts.append(Part(Kind.RUN, view[start:boundary]))
            start = boundary
        if start < passed:
            parts.append(Part(Kind.OPEN, view[start:passed]))

    def _taken(self, length: int, code: int, extension: int) -> Kind | None:
        if code == EXTENDED and length >= 2 and (extension == 0 or extension == self.frame_id):
            kind = Kind.FRAME if extension else Kind.HANDSHAKE
        elif code == PORT and length == 3:
            kind = Kind.PORT
        elif code <= HAVE and length == (5 if code == HAVE else 1):
            kind = Kind.SIGNAL
        else:
            return None
        if 4 + length > MAX_TAKEN:
            raise RemoteProtocolError(f"the peer announced an extended message of {length} bytes")
        return kind

    def _finish_held(self, view: memoryview, parts: list[Part]) -> int:
        """Add to the held bytes until they are a head, then until they are a taken message; return how many were
        used."""
        held = self._held
        used = 0
        while used < len(view):
            step = min(self._wanted(), len(view) - used)
            held += view[used : used + step]
            used += step
            if not self._flush_short(parts) and self._wanted() == 0:
                length, code, extension = _HEAD.unpack_from(held)
                kind = self._taken(length, code, extension)
                whole = memoryview(bytes(held))
                held.clear()
                if kind is None:
                    self._left = 4 + length - len(whole)
                    parts.append(Part(Kind.OPEN if self._left else Kind.RUN, whole))
                else:
                    parts.append(_taken_part(kind, whole))
            if not held:
                break
        return used

    def _wanted(self) -> int:
        """How many more bytes the held ones need before something can be done with them."""
        held = self._held
        if len(held) < 4:
            return 4 - len(held)
        length: int = _LENGTH.unpack_from(held)[0]
        if length > MAX_MESSAGE:
            raise RemoteProtocolError(f"the peer announced a message of {length} bytes")
        if len(held) < _HEAD.size:
            return min(_HEAD.size, 4 + length) - len(held)
        _, code, extension = _HEAD.unpack_from(held)
        return 4 + length - len(held) if self._taken(length, code, extension) else 0

    def _flush_short(self, parts: list[Part]) -> bool:
        """Give out held messages that are too short to have a head of six bytes: keep-alive, choke, …"""
        held = self._held
        if len(held) >= 4 and (size := 4 + _LENGTH.unpack_from(held)[0]) < _HEAD.size and len(held) >= size:
            signal = size == _SIGNAL_BYTES and held[4] <= NOT_INTERESTED
            parts.append(Part(Kind.SIGNAL if signal else Kind.RUN, memoryview(bytes(held[:size]))))
            del held[:size]
            return True
        return False


def _taken_part(kind: Kind, message: memoryview) -> Part:
    return Part(kind, message[6:] if kind is Kind.FRAME or kind is Kind.HANDSHAKE else message)


def signal_message(code: int) -> bytes:
    """``CHOKE``, ``UNCHOKE``, ``INTERESTED`` or ``NOT_INTERESTED`` (BEP 3)."""
    return b"\0\0\0\x01" + bytes((code,))


def extended_message(extension: int, payload: bytes) -> bytes:
    """A BEP 10 message: ``<u32 length><u8 20><u8 extension><payload>``."""
    return extended_head(extension, len(payload)) + payload


def extended_head(extension: int, size: int) -> bytes:
    """What stands before a BEP 10 message's payload of ``size`` bytes."""
    return _HEAD.pack(2 + size, EXTENDED, extension)


def port_message(port: int) -> bytes:
    """A BEP 5 PORT message: the sender's DHT listens on this UDP port."""
    return b"\0\0\0\x03\x09" + port.to_bytes(2, "big")
