"""One direction of one stream: cutting messages into frame bodies, putting them together, and counting credit.

Credit is memory that the receiver has promised. A DATA frame costs its body's bytes; the one that ends a message also
costs what the decoded message takes beyond them (``EncodedMessage.extra``). A frame may be sent while credit is above
zero, so that the last one may overdraw it; the receiver gives credit back as messages are consumed.

A message longer than half the window could wait for credit that only its own end would bring back. The receiver
therefore reserves room for it in a budget that all streams of the pipe share, and from then on returns its bytes'
credit as they arrive.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torrentlm.errors import RemoteProtocolError
from torrentlm.wire.codec import EncodedMessage
from torrentlm.wire.frames import MAX_BODY, Data

MAX_CREDIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of wire version 1, in bytes. Both ends use the same; only tests change them.

    What one peer can make us hold is at most ``MAX_STREAMS`` x (``window`` + what one frame and one decoded message may
    overdraw, 0.6 MiB) + ``reserve``: about 330 MiB, and only if it sends all that and nobody here consumes it.
    """

    message: int = 64 << 20
    window: int = 1 << 20
    reserve: int = 128 << 20
    """Room for messages longer than half a window, all streams together; at least ``message``."""
    unacked: int = 4 << 20
    """Frames kept until they are acknowledged, in case their carrier closes."""
    ack_bytes: int = 256 << 10
    ack_frames: int = 64
    """How much may arrive before an ACK frame of its own is sent; must be well below what ``unacked`` holds."""
    body: int = MAX_BODY - 4
    """Longest body that we put into a DATA frame."""


class SendStream:
    """Messages on their way out. Owned by the PipeCore; ``queued`` counts message bytes not yet put into frames."""

    __slots__ = ("_offset", "_part", "_sent", "_waiting", "credit", "queued")

    def __init__(self, credit: int) -> None:
        self.credit = credit
        self.queued = 0
        self._waiting: deque[EncodedMessage] = deque()
        self._part = 0
        self._offset = 0
        self._sent = 0

    @property
    def can_send(self) -> bool:
        return bool(self._waiting) and self.credit > 0

    def push(self, message: EncodedMessage) -> None:
        self._waiting.append(message)
        self.queued += message.length

    def add_credit(self, amount: int) -> None:
        if not 0 < amount <= MAX_CREDIT - self.credit:
            raise RemoteProtocolError(f"a CREDIT frame grants {amount} bytes on top of {self.credit}")
        self.credit += amount

    def pull(self, limit: int) -> tuple[list[memoryview], bool, bool, int]:
        """The next frame's body, at most ``limit`` bytes of one message.

        Returns its parts, whether it begins the message, whether it ends it, and the message's length.
        """
        message = self._waiting[0]
        first = self._sent == 0
        parts: list[memoryview] = []
        room = limit
        while room and self._part < len(message.parts):
            part = message.parts[self._part]
            piece = part[self._offset : self._offset + room] if self._offset or len(part) > room else part
            parts.append(piece)
            room -= len(piece)
            self._offset += len(piece)
            if self._offset == len(part):
                self._part, self._offset = self._part + 1, 0
        size = limit - room
        self._sent += size
        self.queued -= size
        self.credit -= size
        end = self._sent == message.length
        if end:
            self.credit -= message.extra
            self._waiting.popleft()
            self._part = self._offset = self._sent = 0
        return parts, first, end, message.length

    def drop(self) -> bool:
        """Forget everything queued; return whether the peer has the beginning of a message that will not end."""
        begun = self._sent > 0
        self._waiting.clear()
        self._part = self._offset = self._sent = self.queued = 0
        return begun


class ReceiveStream:
    """A message on its way in, and what the peer may still send."""

    __slots__ = ("_charged", "_length", "_limits", "_partial", "credit", "owed", "reserved")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._partial: bytearray | None = None
        self._length = 0
        self._charged = 0
        self.reserved = 0
        """Bytes of the pipe's reserve that the message being put together holds."""
        self.credit = limits.window
        self.owed = 0
        """Credit that came back and has not been granted yet."""

    @property
    def wants_room(self) -> int:
        """Bytes to reserve before the message being put together gets more than the window; 0 if it needs none."""
        large = self._partial is not None and not self.reserved and self._length > self._limits.window // 2
        return self._length if large else 0

    def reserve(self) -> None:
        """Room was found: what has arrived of the message no longer counts against the window."""
        self.reserved = self._length
        self.owed += self._charged
        self._charged = 0

    def receive(self, frame: Data) -> bytearray | None:
        """Take a DATA frame; return the whole message once it has come. RemoteProtocolError if it breaks a rule.

        The body is copied, so that nothing holds on to the caller's buffer and the message begins aligned in memory.
        """
        if self.credit <= 0:
            raise RemoteProtocolError(f"stream {frame.stream} was sent more than its credit allows")
        size = len(frame.body)
        self.credit -= size
        if frame.first:
            if self._partial is not None:
                raise RemoteProtocolError(f"a message begins on stream {frame.stream} before the last one ended")
            if frame.length > self._limits.message:
                raise RemoteProtocolError(f"a message of {frame.length} bytes; {self._limits.message} are allowed")
            self._partial, self._length, self._charged = bytearray(frame.body), frame.length, size
        elif self._partial is None:
            raise RemoteProtocolError(f"a message goes on that never began on stream {frame.stream}")
        else:
            self._partial += frame.body
            if self.reserved:
                self.owed += size
            else:
                self._charged += size
        have = len(self._partial)
        if have > self._length or frame.end != (have == self._length):
            raise RemoteProtocolError(f"a message on stream {frame.stream} does not have the length it announced")
        return self._partial if frame.end else None

    def finish(self, extra: int) -> tuple[int, int]:
        """The message was decoded and takes ``extra`` bytes more: return what it holds of window and reserve."""
        held = (self._charged + extra, self.reserved)
        self.credit -= extra
        self._partial, self._charged, self.reserved = None, 0, 0
        return held

    def drop(self, stream: int) -> int:
        """Throw the unfinished message away; return the reserved bytes that this frees."""
        if self._partial is None:
            raise RemoteProtocolError(f"stream {stream} is reset, but no message is under way there")
        freed = self.reserved
        self.owed += self._charged
        self._partial, self._charged, self.reserved = None, 0, 0
        return freed

    def grant(self) -> int:
        """Credit to grant now: 0 until it is half a window, which saves frames."""
        if self.owed < max(1, self._limits.window // 2):
            return 0
        amount, self.owed = self.owed, 0
        self.credit += amount
        return amount
