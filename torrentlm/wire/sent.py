"""Sequenced frames that were sent and are not acknowledged yet, in case their carrier takes them with it."""

from __future__ import annotations

from collections import deque

from torrentlm.errors import RemoteProtocolError

SEQUENCE_MASK = 0xFFFFFFFF
SEQUENCE_HALF = 0x80000000
"""Numbers of frames are compared modulo 2^32, as in RFC 1982."""

_FRAME_COST = 64  # bytes of memory that a kept frame takes beside its own


class SentFrames:
    """The frames from the first unacknowledged one to the last, and how many of them the present carrier was given."""

    __slots__ = ("_frames", "_handed_over", "next_seq", "size")

    def __init__(self) -> None:
        self.next_seq = 0
        """The number of the next new frame."""
        self.size = 0
        """Bytes of memory that the frames take."""
        self._frames: deque[bytes] = deque()
        self._handed_over = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def waits(self) -> bool:
        """Frames are to be sent again before any new one."""
        return self._handed_over < len(self._frames)

    def again(self) -> bytes:
        """The next frame to send again. Precondition: ``waits``."""
        frame = self._frames[self._handed_over]
        self._handed_over += 1
        return frame

    def add(self, frame: bytes) -> None:
        """A new frame, number ``next_seq``, is on its way. Precondition: not ``waits``."""
        self._frames.append(frame)
        self._handed_over += 1
        self.size += len(frame) + _FRAME_COST
        self.next_seq = (self.next_seq + 1) & SEQUENCE_MASK

    def rewind(self) -> None:
        """Another carrier is in use: it was given nothing yet."""
        self._handed_over = 0

    def release(self, ack: int) -> None:
        """Let go of the frames before ``ack``. An older acknowledgement than the last says nothing new.

        :raises RemoteProtocolError: that frame was never sent.
        """
        count = (ack - self.next_seq + len(self._frames)) & SEQUENCE_MASK
        if count >= SEQUENCE_HALF:
            return
        if count > len(self._frames):
            raise RemoteProtocolError(f"frame {ack} is acknowledged but was never sent")
        for _ in range(count):
            self.size -= len(self._frames.popleft()) + _FRAME_COST
        self._handed_over = max(0, self._handed_over - count)

    def clear(self) -> None:
        self._frames.clear()
        self._handed_over = self.size = 0
