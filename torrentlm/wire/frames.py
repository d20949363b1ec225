"""Frames: what one BEP 10 extended message of the pipe carries, byte for byte as docs/protocol.md lays it out.

All integers are big-endian, as in BEP 3. The low four bits of a frame's first byte are its type; DATA uses two of the
others as flags. A frame arrives whole, because BEP 3 framing delimits it, so that decoders check the exact length that
they expect.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey

WIRE_VERSION = 1
OLDEST_WIRE_VERSION = 1

BEP3_OVERHEAD = 6
"""``<u32 length><u8 20><u8 extension id>`` before every frame on the TCP connection."""

MAX_FRAME = 65536 - BEP3_OVERHEAD
"""Longest frame in bytes, so that one frame is 64 KiB on the connection at most, everything included."""

MAX_HELLO = 1024
MAX_TEXT = 255
MAX_STREAMS = 128
"""Stream ids run from 0 to 127, in each direction by itself."""

FIRST = 0x10
END = 0x20
"""Flags in a DATA frame's first byte: it begins a message, it ends one."""


class FrameType(IntEnum):
    HELLO = 1
    PROOF = 2
    SELECT = 3
    DATA = 4
    CREDIT = 5
    RESET = 6
    ACK = 7
    PING = 8
    PONG = 9
    BYE = 10


class ByeCode(IntEnum):
    """Why a pipe ends. Codes that are not listed read as DONE."""

    DONE = 0
    IDLE = 1
    PROTOCOL_ERROR = 2
    SHUTDOWN = 3
    BUSY = 4


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks on this carrier. ``instance`` is 8 random bytes per process, ``nonce`` 32 random bytes per carrier.

    ``version`` is the newest wire version spoken and ``oldest`` the oldest; ``port`` is where the node listens (0:
    nowhere); ``software`` names libraries and versions, for people and for judging numeric equality: "torrentlm/0.1.0
    torch/2.13.0".
    """

    node: NodeKey
    nonce: bytes
    instance: bytes
    port: int = 0
    software: str = ""
    version: int = WIRE_VERSION
    oldest: int = OLDEST_WIRE_VERSION


@dataclass(frozen=True, slots=True)
class Proof:
    """The sender holds the key that its HELLO named. ``generation`` tells its earlier pipes with this peer from this
    one."""

    generation: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Select:
    """Leader to follower: send on the carrier that this arrives on. The highest ``serial`` counts."""

    serial: int
    ack: int


@dataclass(frozen=True, slots=True)
class Data:
    """A part of one message. ``length`` is the whole message's in a first frame, otherwise 0; ``body`` is never
    empty."""

    seq: int
    ack: int
    stream: int
    first: bool
    end: bool
    length: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Credit:
    """The receiver of this may send ``amount`` more bytes on ``stream``."""

    seq: int
    ack: int
    stream: int
    amount: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The message begun on ``stream`` will not be finished; what came of it is thrown away."""

    seq: int
    ack: int
    stream: int


@dataclass(frozen=True, slots=True)
class Ack:
    """``ack`` is the sequence number of the next sequenced frame that the sender of this waits for."""

    ack: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by a PONG with the same 8 bytes on the same carrier."""

    token: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    token: bytes


@dataclass(frozen=True, slots=True)
class Bye:
    """The pipe ends here, on all its carriers."""

    code: int
    reason: str = ""


FixedFrame = Proof | Select | Credit | Reset | Ack | Ping | Pong
Frame = Hello | FixedFrame | Data | Bye

# First byte, layout: the fields follow the type byte in the order of the dataclass.
_FIXED: dict[type[FixedFrame], tuple[FrameType, struct.Struct]] = {
    Proof: (FrameType.PROOF, struct.Struct(">BI64s")),
    Select: (FrameType.SELECT, struct.Struct(">BII")),
    Credit: (FrameType.CREDIT, struct.Struct(">BIIHI")),
    Reset: (FrameType.RESET, struct.Struct(">BIIH")),
    Ack: (FrameType.ACK, struct.Struct(">BI")),
    Ping: (FrameType.PING, struct.Struct(">B8s")),
    Pong: (FrameType.PONG, struct.Struct(">B8s")),
}
_BY_TYPE = {int(kind): (frame, layout) for frame, (kind, layout) in _FIXED.items()}
_HELLO = struct.Struct(">BBB32s32s8sHB")
_DATA = struct.Struct(">BIIH")
_LENGTH = struct.Struct(">I")

DATA_OVERHEAD = _DATA.size
MAX_BODY = MAX_FRAME - DATA_OVERHEAD
"""Most message bytes that one DATA frame carries; four fewer in a first frame that does not end its message."""


def encode_frame(frame: Hello | FixedFrame | Bye) -> bytes:
    """The bytes of any frame but DATA; raise LocalProtocolError if a field does not fit its place."""
    try:
        if isinstance(frame, Hello):
            return _encode_hello(frame)
        if isinstance(frame, Bye):
            return bytes((FrameType.BYE, frame.code)) + _shortened(frame.reason)
        kind, layout = _FIXED[type(frame)]
        return layout.pack(kind, *[getattr(frame, name) for name in frame.__slots__])
    except (struct.error, ValueError) as error:
        raise LocalProtocolError(f"{type(frame).__name__} has a field that does not fit: {error}") from error


def encode_data(
    seq: int, ack: int, stream: int, parts: list[memoryview], *, first: bool, end: bool, length: int = 0
) -> bytes:
    """A DATA frame with ``parts`` as its body: the one copy that sending a tensor makes. ``length``: see Data."""
    head = _DATA.pack(FrameType.DATA | (FIRST if first else 0) | (END if end else 0), seq, ack, stream)
    if first and not end:
        head += _LENGTH.pack(length)
    return b"".join([head, *parts])


def decode_frame(data: bytes | bytearray | memoryview) -> Frame:
    """Read one whole frame; raise RemoteProtocolError on anything that docs/protocol.md does not allow.

    A DATA frame's body is a view of ``data``; nothing else in the result refers to it.
    """
    if not 1 <= len(data) <= MAX_FRAME:
        raise RemoteProtocolError(f"a frame has {len(data)} bytes; 1 to {MAX_FRAME} are allowed")
    kind = data[0]
    if kind & ~(FIRST | END) == FrameType.DATA:
        return _decode_data(kind, memoryview(data))
    if kind == FrameType.HELLO:
        return _decode_hello(bytes(data))
    if kind == FrameType.BYE:
        if not 2 <= len(data) <= 2 + MAX_TEXT:
            raise RemoteProtocolError(f"a BYE frame has {len(data)} bytes")
        return Bye(data[1], _text(bytes(data[2:])))
    fixed = _BY_TYPE.get(kind)
    if fixed is None:
        raise RemoteProtocolError(f"a frame has the unknown type 0x{kind:02x}")
    frame, layout = fixed
    if len(data) != layout.size:
        raise RemoteProtocolError(f"a {frame.__name__} frame has {len(data)} bytes instead of {layout.size}")
    decoded = frame(*layout.unpack(data)[1:])
    if isinstance(decoded, Credit | Reset):
        _check_stream(decoded.stream)
    return decoded


def _decode_data(kind: int, data: memoryview) -> Data:
    first, end = bool(kind & FIRST), bool(kind & END)
    start = DATA_OVERHEAD + (_LENGTH.size if first and not end else 0)
    if len(data) <= start:
        raise RemoteProtocolError("a DATA frame has no body")
    _, seq, ack, stream = _DATA.unpack_from(data)
    _check_stream(stream)
    body = data[start:]
    length = len(body) if first else 0
    if first and not end:
        (length,) = _LENGTH.unpack_from(data, DATA_OVERHEAD)
        if length <= len(body):
            raise RemoteProtocolError("the first frame of a message holds all of it but does not end it")
    return Data(seq, ack, stream, first, end, length, body)


def _encode_hello(hello: Hello) -> bytes:
    software = _shortened(hello.software)
    if (len(hello.node), len(hello.nonce), len(hello.instance)) != (32, 32, 8):
        raise ValueError("a node key and a nonce have 32 bytes, an instance 8")
    head = _HELLO.pack(
        FrameType.HELLO, hello.version, hello.oldest, hello.node, hello.nonce, hello.instance, hello.port, len(software)
    )
    return head + software


def _decode_hello(data: bytes) -> Hello:
    """Bytes after the fields that we know belong to later versions and are passed over."""
    if not _HELLO.size <= len(data) <= MAX_HELLO:
        raise RemoteProtocolError(f"a HELLO frame has {len(data)} bytes")
    _, version, oldest, node, nonce, instance, port, length = _HELLO.unpack_from(data)
    if not 1 <= oldest <= version:
        raise RemoteProtocolError(f"a HELLO speaks versions {oldest} to {version}")
    software = data[_HELLO.size : _HELLO.size + length]
    if len(software) < length:
        raise RemoteProtocolError("a HELLO ends inside its software name")
    return Hello(NodeKey(node), nonce, instance, port, _text(software), version, oldest)


def _check_stream(stream: int) -> None:
    if stream >= MAX_STREAMS:
        raise RemoteProtocolError(f"a frame names stream {stream}; ids run from 0 to {MAX_STREAMS - 1}")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("a frame holds a text that is not UTF-8") from error


def _shortened(text: str) -> bytes:
    """UTF-8 in at most MAX_TEXT bytes, cut between characters."""
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore").encode()
