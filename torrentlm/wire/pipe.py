"""The pipe: one ordered, reliable set of streams between two nodes, over whichever carriers they have.

Theory of operation
-------------------
A *carrier* is one TCP connection whose other end is authenticated (handshake.py). A pipe has any number of them; the
node with the lower key is its *leader* and says on which one both send (SELECT). DATA, CREDIT and RESET frames carry a
sequence number and are kept until acknowledged; when the pipe moves to another carrier, the unacknowledged ones are
sent again there and the receiver drops those that it has. Every other frame belongs to the carrier that it travels on.

    state      event                                     what the leader does        what the follower does
    ---------  ----------------------------------------  --------------------------  ---------------------------
    waiting    a carrier opens                           SELECT on it -> sending     nothing
    waiting    a SELECT newer than the last comes        (an error)                  ACK on it -> sending there
    sending    the selected carrier closes               SELECT the oldest other     -> waiting
                                                         one, or -> waiting
    sending    it SELECTs while frames are unacked       holds sequenced frames      (as above) resends what the
                                                         until an ACK comes there,   SELECT did not acknowledge
                                                         then resends the rest
    any        BYE, or a broken rule                     -> closed                   -> closed

No I/O and no clock: who drives this object (the gateway) passes each arriving frame to ``receive_frame`` and asks
``next_frame`` whenever a connection can take something. Any call may make any carrier have something to send.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey
from torrentlm.wire.frames import (
    MAX_STREAMS,
    Ack,
    Bye,
    ByeCode,
    Credit,
    Data,
    Ping,
    Pong,
    Reset,
    Select,
    decode_frame,
    encode_data,
    encode_frame,
)
from torrentlm.wire.handshake import Authenticated
from torrentlm.wire.messages import Message, decode_message, encode_message
from torrentlm.wire.sent import SEQUENCE_HALF, SEQUENCE_MASK, SentFrames
from torrentlm.wire.streams import Limits, ReceiveStream, SendStream

MAX_CONTROL_BACKLOG = 64
"""PONGs that may wait on one carrier."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A message came. Hand this event to ``PipeCore.consumed`` once the message no longer takes up memory.

    ``size`` is the message's length on the wire. ``held`` and ``reserved`` are the core's own accounts.
    """

    stream: int
    message: Message
    size: int
    held: int
    reserved: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The answer to ``ping`` on this carrier."""

    carrier: int
    token: bytes


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The peer ended the pipe."""

    code: int
    reason: str


Event = MessageReceived | PongReceived | PeerClosed


class PipeCore:
    """The state of one pipe. Not thread-safe; nothing here waits.

    :param own: our node key.
    :param established: what the handshake of its first carrier gave.
    """

    def __init__(self, own: NodeKey, established: Authenticated, limits: Limits | None = None) -> None:
        self.own = own
        self.peer = established.peer
        self.generation = established.generation
        self.peer_generation = established.peer_generation
        self.limits = limits or Limits()
        self.leader = own < established.peer.node
        self.active: int | None = None
        """The carrier that we send sequenced frames on."""
        self.closed = False
        self._carriers: dict[int, deque[bytes]] = {}  # unsequenced frames waiting, oldest carrier first
        self._serial = 0
        self._awaits_answer = False

        self._sent = SentFrames()
        self._receive_seq = 0
        self._unanswered_frames = 0
        self._unanswered_bytes = 0
        self._ack_due = False

        self._outgoing: dict[int, SendStream] = {}
        self._incoming: dict[int, ReceiveStream] = {}
        self._turns: deque[int] = deque()  # streams that can send, in round-robin order
        self._announcements: deque[tuple[type[Credit] | type[Reset], int, int]] = deque()
        self._reserve_left = self.limits.reserve
        self._want_room: deque[int] = deque()

    # -- carriers ----------------------------------------------------------------------------------------------------

    @property
    def carriers(self) -> tuple[int, ...]:
        """Open carriers, oldest first."""
        return tuple(self._carriers)

    def carrier_opened(self, carrier: int) -> None:
        """An authenticated carrier of this pipe is there. ``carrier`` is any number that was never used before."""
        if self.closed or carrier in self._carriers:
            raise LocalProtocolError(f"carrier {carrier} is open already, or its pipe is closed")
        self._carriers[carrier] = deque()
        if self.leader and self.active is None:
            self.select(carrier)

    def carrier_closed(self, carrier: int) -> None:
        """A carrier is gone, with whatever it had not delivered. Unknown carriers are fine."""
        if self._carriers.pop(carrier, None) is None or carrier != self.active:
            return
        self.active = None
        if self.leader and self._carriers:
            self.select(next(iter(self._carriers)))

    def select(self, carrier: int) -> None:
        """Move the pipe to another open carrier (the leader's choice only)."""
        if not self.leader or carrier not in self._carriers:
            raise LocalProtocolError("only the leader selects, and only an open carrier")
        if carrier == self.active:
            return
        self.active = carrier
        self._sent.rewind()
        self._awaits_answer = len(self._sent) > 0
        self._serial += 1
        self._carriers[carrier].append(encode_frame(Select(self._serial, self._receive_seq)))

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(self, message: Message, stream: int = 0) -> int:
        """Queue a message; return its length on the wire.

        Tensor data is not copied before it is put into frames: never change it after this call.

        :raises LocalProtocolError: the message breaks a bound, the stream does not exist or is not ``writable``, or the
            pipe is closed.
        """
        if self.closed:
            raise LocalProtocolError("the pipe is closed")
        outgoing = self._send_stream(stream)
        if not self.writable(stream):
            raise LocalProtocolError(f"stream {stream} has {outgoing.queued} bytes queued: wait until it is writable")
        encoded = encode_message(message)
        if encoded.length > self.limits.message:
            raise LocalProtocolError(f"a message of {encoded.length} bytes; {self.limits.message} are allowed")
        outgoing.push(encoded)
        self._take_turn(stream, outgoing)
        return encoded.length

    def writable(self, stream: int) -> bool:
        """Whether ``send`` takes another message on this stream now: less than a window's bytes wait there."""
        return self._send_stream(stream).queued < self.limits.window

    def reset(self, stream: int) -> None:
        """Drop all that waits on a stream; tell the peer to throw away a message that was under way."""
        outgoing = self._send_stream(stream)
        if outgoing.drop():
            self._announcements.append((Reset, stream, 0))
        if stream in self._turns:
            self._turns.remove(stream)

    def ping(self, carrier: int, token: bytes) -> None:
        """Ask for a PONG with these 8 bytes on an open carrier."""
        if carrier not in self._carriers or len(token) != 8:
            raise LocalProtocolError("a ping needs an open carrier and 8 bytes")
        self._carriers[carrier].append(encode_frame(Ping(token)))

    def flush_ack(self) -> None:
        """Acknowledge what has come, without waiting for more of it. For the caller's idle timer."""
        self._ack_due = self._ack_due or self._unanswered_frames > 0

    def close(self, code: int = ByeCode.DONE, reason: str = "") -> None:
        """End the pipe now: what is queued is dropped and BYE goes out on every carrier. Idempotent."""
        if self.closed:
            return
        self._forget()
        for waiting in self._carriers.values():
            waiting.append(encode_frame(Bye(code, reason)))

    @property
    def idle(self) -> bool:
        """Nothing is queued, and the peer has acknowledged everything."""
        return not self._sent and not self._announcements and not any(out.queued for out in self._outgoing.values())

    def ready_carriers(self) -> list[int]:
        """Carriers for which ``next_frame`` has something now."""
        return [carrier for carrier in self._carriers if self.has_frames(carrier)]

    def has_frames(self, carrier: int) -> bool:
        """Whether ``next_frame(carrier)`` would return a frame."""
        if self._carriers.get(carrier):
            return True
        return carrier == self.active and not self.closed and (self._ack_due or self._can_send_sequenced())

    def next_frame(self, carrier: int) -> bytes | None:
        """The next frame to write to a carrier, or None. Once returned it counts as sent."""
        waiting = self._carriers.get(carrier)
        if waiting:
            return waiting.popleft()
        if carrier != self.active or self.closed:
            return None
        if self._can_send_sequenced():
            return self._next_sequenced()
        if self._ack_due:
            return encode_frame(Ack(self._answered()))
        return None

    def _can_send_sequenced(self) -> bool:
        if self._awaits_answer:
            return False
        return self._sent.waits or (bool(self._announcements or self._turns) and self._sent.size < self.limits.unacked)

    def _next_sequenced(self) -> bytes:
        """Lost frames first, then credit and resets, then streams in turn. Precondition: ``_can_send_sequenced``."""
        if self._sent.waits:
            return self._sent.again()
        seq, ack = self._sent.next_seq, self._answered()
        if self._announcements:
            kind, stream, amount = self._announcements.popleft()
            frame = encode_frame(Reset(seq, ack, stream) if kind is Reset else Credit(seq, ack, stream, amount))
        else:
            stream = self._turns.popleft()
            outgoing = self._outgoing[stream]
            parts, first, end, length = outgoing.pull(self.limits.body)
            frame = encode_data(seq, ack, stream, parts, first=first, end=end, length=length)
            self._take_turn(stream, outgoing)
        self._sent.add(frame)
        return frame

    def _answered(self) -> int:
        """The acknowledgement to put into a frame that is about to leave."""
        self._ack_due = False
        self._unanswered_frames = self._unanswered_bytes = 0
        return self._receive_seq

    def _send_stream(self, stream: int) -> SendStream:
        outgoing = self._outgoing.get(stream)
        if outgoing is None:
            if not 0 <= stream < MAX_STREAMS:
                raise LocalProtocolError(f"stream {stream} does not exist; ids run from 0 to {MAX_STREAMS - 1}")
            outgoing = self._outgoing[stream] = SendStream(self.limits.window)
        return outgoing

    # -- receiving ---------------------------------------------------------------------------------------------------

    def receive_frame(self, carrier: int, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take one whole frame that came on an open carrier; return what it completes.

        ``data`` is only read during the call; events do not refer to it.

        :raises RemoteProtocolError: the peer broke a rule. Say so with ``close`` and close its carriers.
        """
        if self.closed:
            return []
        if carrier not in self._carriers:
            raise LocalProtocolError(f"carrier {carrier} is not open")
        frame = decode_frame(data)
        if isinstance(frame, Data | Credit | Reset):
            return self._receive_sequenced(carrier, frame, len(data))
        if isinstance(frame, Ack):
            self._acknowledged(carrier, frame.ack)
        elif isinstance(frame, Ping):
            self._pong(carrier, frame.token)
        elif isinstance(frame, Pong):
            return [PongReceived(carrier, frame.token)]
        elif isinstance(frame, Select):
            self._selected(carrier, frame)
        elif isinstance(frame, Bye):
            self._forget()
            return [PeerClosed(frame.code, frame.reason)]
        else:
            raise RemoteProtocolError(f"a {type(frame).__name__} frame came after the handshake")
        return []

    def _receive_sequenced(self, carrier: int, frame: Data | Credit | Reset, size: int) -> list[Event]:
        self._acknowledged(carrier, frame.ack)
        self._unanswered_frames += 1
        self._unanswered_bytes += size
        if self._unanswered_frames >= self.limits.ack_frames or self._unanswered_bytes >= self.limits.ack_bytes:
            self._ack_due = True
        ahead = (frame.seq - self._receive_seq) & SEQUENCE_MASK
        if ahead >= SEQUENCE_HALF:
            return []  # a duplicate, sent again because its carrier closed
        if ahead:
            raise RemoteProtocolError(f"{ahead} frames are missing before number {frame.seq}")
        self._receive_seq = (self._receive_seq + 1) & SEQUENCE_MASK
        if isinstance(frame, Data):
            return self._receive_data(frame)
        if isinstance(frame, Credit):
            outgoing = self._send_stream(frame.stream)
            outgoing.add_credit(frame.amount)
            self._take_turn(frame.stream, outgoing)
        else:
            self._reserve_left += self._receive_stream(frame.stream).drop(frame.stream)
            self._give_room()
            self._grant(frame.stream)
        return []

    def _receive_data(self, frame: Data) -> list[Event]:
        incoming = self._receive_stream(frame.stream)
        body = incoming.receive(frame)
        if body is None:
            if incoming.wants_room and frame.stream not in self._want_room:
                self._want_room.append(frame.stream)
                self._give_room()
            self._grant(frame.stream)
            return []
        message, extra = decode_message(body)
        held, reserved = incoming.finish(extra)
        return [MessageReceived(frame.stream, message, len(body), held, reserved)]

    def consumed(self, event: MessageReceived) -> None:
        """The message no longer takes up memory here: return its credit. Call it exactly once for each event."""
        self._receive_stream(event.stream).owed += event.held
        self._reserve_left += event.reserved
        self._give_room()
        self._grant(event.stream)

    def _give_room(self) -> None:
        """Reserve room for large messages, in the order in which they were announced."""
        while self._want_room:
            stream = self._want_room[0]
            incoming = self._receive_stream(stream)
            wanted = incoming.wants_room
            if wanted > self._reserve_left:
                return
            self._want_room.popleft()
            if wanted:
                self._reserve_left -= wanted
                incoming.reserve()
                self._grant(stream)

    def _grant(self, stream: int) -> None:
        amount = self._receive_stream(stream).grant()
        if amount and not self.closed:
            self._announcements.append((Credit, stream, amount))

    def _receive_stream(self, stream: int) -> ReceiveStream:
        incoming = self._incoming.get(stream)
        if incoming is None:
            incoming = self._incoming[stream] = ReceiveStream(self.limits)
        return incoming

    def _take_turn(self, stream: int, outgoing: SendStream) -> None:
        if outgoing.can_send and stream not in self._turns:
            self._turns.append(stream)

    def _acknowledged(self, carrier: int, ack: int) -> None:
        self._sent.release(ack)
        if carrier == self.active:
            self._awaits_answer = False

    def _selected(self, carrier: int, frame: Select) -> None:
        if self.leader:
            raise RemoteProtocolError("a SELECT came from the node that is not the leader")
        if frame.serial <= self._serial:
            return  # overtaken by a later choice that came on another carrier
        self._serial = frame.serial
        self._acknowledged(carrier, frame.ack)
        if carrier != self.active:
            self.active = carrier
            self._sent.rewind()
        self._ack_due = True

    def _pong(self, carrier: int, token: bytes) -> None:
        waiting = self._carriers[carrier]
        if len(waiting) >= MAX_CONTROL_BACKLOG:
            raise RemoteProtocolError("pings come faster than the connection takes their answers")
        waiting.append(encode_frame(Pong(token)))

    def _forget(self) -> None:
        self.closed = True
        for waiting in self._carriers.values():
            waiting.clear()
        self._sent.clear()
        self._announcements.clear()
        self._turns.clear()
        self._outgoing.clear()
        self._incoming.clear()
        self._want_room.clear()
