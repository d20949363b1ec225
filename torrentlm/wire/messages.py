"""The pipe's messages: what nodes say to one another, with the bounds of every field where it is declared.

Values are checked against those bounds on both sides; a class itself accepts anything. Sequences are tuples, ids bytes.
The meaning of session, epoch, position and emit_from is told in docs/protocol.md under "Fencing".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated

from torrentlm.errors import RemoteProtocolError
from torrentlm.records import MAX_LANES, AdapterId, Endpoint, Lane, NodeKey, PeerRecord, Sampling, SessionId, Span, Stop
from torrentlm.wire.codec import EncodedMessage, Schema
from torrentlm.wire.kinds import (
    Array,
    Bytes,
    Enumerated,
    Float,
    Int,
    OneOf,
    Optional,
    Struct,
    TensorKind,
    Text,
)
from torrentlm.wire.tensors import Tensor

MAX_BATCH = 256
MAX_TENSORS = 64
MAX_TOKENS = 2**24 - 1
"""Longest sequence, in tokens."""

FAIL_CODES = (
    "bad_request",
    "busy",
    "internal",
    "lost_next",
    "max_length",
    "memory",
    "no_adapter",
    "no_block",
    "unknown_session",
    "wrong_model",
)
FINISH_REASONS = ("stop_token", "stop_string", "length", "cancelled")

_block = Int(0, 65535)
_port = Int(1, 65535)
_token = Int(0, 2**31 - 1)
_u63 = Int(0, 2**63 - 1)

_span = Struct(Span, first=_block, last=_block)
_lane = Struct(
    Lane,
    span=_span,
    device=Text(64),
    precision=Text(16),
    block_ms=Float(0, 1e6),
    sessions=_block,
    number=Int(0, MAX_LANES - 1),
)
_record = Struct(
    PeerRecord,
    node=Bytes(32),
    model=Bytes(32),
    port=Int(0, 65535),
    sequence=_u63,
    held=Array(_span, 256),
    resident=Array(_span, 256),
    claimed=Array(_span, 256),
    device=Text(64),
    precision=Text(16),
    memory_free=_u63,
    block_ms=Float(0, 1e6),
    sessions=_block,
    adapters=_u63,
    offered=Array(_span, 256),
    fetching=Array(_span, 256),
    lanes=Array(_lane, MAX_LANES),
)
_adapter = Struct(AdapterId, v1=Bytes(20), v2=Bytes(32))
_sampling = Struct(
    Sampling,
    temperature=Float(0, 1e3),
    top_k=_token,
    top_p=Float(0, 1),
    min_p=Float(0, 1),
    repetition_penalty=Float(1e-3, 1e3),
    seed=Int(0, 2**64 - 1),
)
_stop = Struct(Stop, tokens=Array(_token, 64), strings=Array(Text(256), 16))

Session = Annotated[SessionId, Bytes(16)]
Epoch = Annotated[int, Int(0, 2**32 - 1)]
Position = Annotated[int, Int(0, MAX_TOKENS)]
Node = Annotated[NodeKey, Bytes(32)]
Block = Annotated[int, _block]
Tensors = Annotated[tuple[Tensor, ...], Array(TensorKind(), MAX_TENSORS)]


class Want(IntEnum):
    """What the last holder of the route does with a step's result."""

    NONE = 0
    SAMPLE = 1
    LOGITS_LAST = 2
    LOGITS_ALL = 3
    HIDDEN = 4


@dataclass(frozen=True, slots=True)
class Contact:
    """A node and where it listens."""

    node: Node
    host: Annotated[str, Text(255)]
    port: Annotated[int, _port]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.host, self.port)


@dataclass(frozen=True, slots=True)
class NextHop(Contact):
    """The contact that a holder sends its results on to, and the session's handle there.

    Each hop has a handle of its own: one node may run two hops of a route, and knowing one handle is no key to another.
    """

    session: Annotated[SessionId, Bytes(16)]


_contact = Struct(Contact)
_next_hop = Struct(NextHop)


@dataclass(frozen=True, slots=True)
class Record:
    """The sender's own record for one model: the first message on a pipe, and again whenever it changes."""

    record: Annotated[PeerRecord, _record]


@dataclass(frozen=True, slots=True)
class Peers:
    """Gossip: nodes that the sender knows."""

    entries: Annotated[tuple[Contact, ...], Array(_contact, 32)]


@dataclass(frozen=True, slots=True)
class Open:
    """Client to holder: make room for a session on blocks ``first`` to ``last``. Answered by Opened or Fail.

    Steps are accepted from this pipe's peer and from the nodes in ``prev``; results go to ``next`` (None: back to the
    client). ``next`` of the head's holder is the stem's holder, which it feeds with sampled tokens. ``pads``: padding
    per row of the batch, before the text or, where negative, behind it at the end of ``max_length``; empty for none.
    ``source``: tokens per row that an encoder has read, for blocks of a decoder that is to be told of them by
    ``Encoded``. ``adapter``: apply what it has for these blocks, in this session only.
    """

    session: Session
    epoch: Epoch
    model: Annotated[bytes, Bytes(32)]
    first: Block
    last: Block
    prev: Annotated[tuple[NodeKey, ...], Array(Bytes(32), 16)]
    next: Annotated[NextHop | None, Optional(_next_hop)]
    batch: Annotated[int, Int(1, MAX_BATCH)]
    max_length: Annotated[int, Int(1, MAX_TOKENS)]
    lease_ms: Annotated[int, Int(1, 86_400_000)]
    pads: Annotated[tuple[int, ...], Array(Int(-MAX_TOKENS, MAX_TOKENS), MAX_BATCH)] = ()
    source: Position = 0
    adapter: Annotated[AdapterId | None, Optional(_adapter)] = None

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"{self.first}-{self.last} is not a range of blocks")
        if self.pads and len(self.pads) != self.batch:
            raise ValueError(f"pads has {len(self.pads)} entries for a batch of {self.batch}")


@dataclass(frozen=True, slots=True)
class Opened:
    """Holder to client: the session has its room, ``kv_bytes`` of memory at full length.

    It ends ``lease_ms`` after its last renewal, which is at most what the client asked for."""

    session: Session
    epoch: Epoch
    kv_bytes: Annotated[int, _u63]
    lease_ms: Annotated[int, Int(1, 86_400_000)]


@dataclass(frozen=True, slots=True)
class Generate:
    """Client to the head's holder, before the first step of an epoch: sample, and feed the stem, until something stops
    it.

    ``history`` [batch, n] I32: the token ids so far, for the repetition penalty only.
    """

    session: Session
    epoch: Epoch
    emit_from: Position
    max_new_tokens: Annotated[int, Int(1, MAX_TOKENS)]
    sampling: Annotated[Sampling, _sampling] = field(default_factory=Sampling)
    stop: Annotated[Stop, _stop] = field(default_factory=Stop)
    history: Annotated[Tensor | None, Optional(TensorKind())] = None


@dataclass(frozen=True, slots=True)
class Step:
    """Run these inputs: from the client or the head's holder to the stem, and from each holder to the next.

    ``position``: tokens per row in the cache before this step. ``reorder``: for each row of the batch, the row that it
    continues, applied first. ``tokens``: new tokens per row, may be 0. ``tensors``: to the stem one I32 or I64
    [batch, tokens] of token ids, behind it whatever travels between the two blocks, see docs/protocol.md, "Borders".
    """

    session: Session
    epoch: Epoch
    position: Position
    emit_from: Position
    want: Annotated[Want, Enumerated(Want)]
    reorder: Annotated[tuple[int, ...] | None, Optional(Array(Int(0, MAX_BATCH - 1), MAX_BATCH))]
    tensors: Tensors
    tokens: Position

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Client to every holder of a decoder's session: what the encoder made. Steps wait for it.

    ``tensors``: hidden states [batch, source, width], floating point, and BOOL [batch, source], false for padding.
    """

    session: Session
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Token:
    """The head's holder to the client: the tokens of one position, a row each, and in the last one why it stops.

    ``index`` counts the tokens of this Generate from 0.
    """

    session: Session
    epoch: Epoch
    position: Position
    index: Position
    tokens: Annotated[tuple[int, ...], Array(_token, MAX_BATCH)]
    finish: Annotated[str | None, Optional(OneOf(FINISH_REASONS))] = None


@dataclass(frozen=True, slots=True)
class Output:
    """The last holder to the client: what a step with ``want`` LOGITS_* or HIDDEN asked for. ``position`` is the
    step's. With want NONE it brings nothing and says that the step is in every cache."""

    session: Session
    epoch: Epoch
    position: Position
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Halt:
    """Drop the steps of this epoch and of earlier ones; the cache stays."""

    session: Session
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Renew:
    """Client to holder: these sessions live for another lease."""

    sessions: Annotated[tuple[SessionId, ...], Array(Bytes(16), 256)]


@dataclass(frozen=True, slots=True)
class Close:
    """Client to holder: free the session."""

    session: Session


@dataclass(frozen=True, slots=True)
class Fail:
    """Holder to client: it could not do something for this session. ``message`` is one sentence for people."""

    session: Session
    epoch: Epoch
    code: Annotated[str, OneOf(FAIL_CODES)]
    message: Annotated[str, Text(512)]
    block: Annotated[int | None, Optional(_block)] = None


@dataclass(frozen=True, slots=True)
class AskSidecar:
    """For the sidecar of a model: how its split was proven, and samples to check blocks against.

    Answered by SidecarBytes."""

    model: Annotated[bytes, Bytes(32)]


@dataclass(frozen=True, slots=True)
class SidecarBytes:
    """The answer: U8 [n], a sidecar as its sender has it (n = 0: it has none)."""

    model: Annotated[bytes, Bytes(32)]
    content: Annotated[Tensor, TensorKind()]


Message = (
    Record
    | Peers
    | Open
    | Opened
    | Generate
    | Step
    | Token
    | Output
    | Halt
    | Renew
    | Close
    | Fail
    | Encoded
    | AskSidecar
    | SidecarBytes
)

SCHEMA = Schema(
    {
        1: Record,
        2: Peers,
        3: Open,
        4: Opened,
        5: Generate,
        6: Step,
        7: Token,
        8: Output,
        9: Halt,
        10: Renew,
        11: Close,
        12: Fail,
        13: Encoded,
        14: AskSidecar,
        15: SidecarBytes,
    }
)


def encode_message(message: Message) -> EncodedMessage:
    """:raises LocalProtocolError: a field is out of bounds."""
    return SCHEMA.encode(message)


def decode_message(data: bytes | bytearray | memoryview) -> tuple[Message, int]:
    """The message, and the credit that it costs beyond its length (see streams.py).

    :raises RemoteProtocolError: these bytes are not a message.
    """
    message, extra = SCHEMA.decode(data)
    return message, extra


def encode_record(record: PeerRecord) -> bytes:
    """A record as a message's bytes, for storage elsewhere (a BEP 44 item)."""
    return b"".join(SCHEMA.encode(Record(record)).parts)


def decode_record(data: bytes) -> PeerRecord:
    """:raises RemoteProtocolError: these bytes are not a record."""
    message, _ = SCHEMA.decode(data)
    if not isinstance(message, Record):
        raise RemoteProtocolError(f"a {type(message).__name__} stands where a record should")
    return message.record
