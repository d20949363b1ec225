"""The frames of one connection: first those of the handshake that authenticates the peer, then those of the pipe.

A frame is the payload of a BEP 10 message with the receiver's id for "torrentlm_pipe". An *empty* one belongs to no
pipe: it says that the sender's BitTorrent client has left this connection and that nothing but frames will follow
from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torrentlm.gateway.outbox import Buffers
from torrentlm.wire.frames import BEP3_OVERHEAD
from torrentlm.wire.handshake import CarrierHandshake
from torrentlm.wire.peerwire import extended_head, extended_message

if TYPE_CHECKING:
    from torrentlm.gateway.pipe import Pipe

_JOIN_BELOW = 4096
"""Shorter frames are copied behind their head; longer ones go out as two buffers."""


class Carrier:
    """``number`` names it towards the pipe core; ``remote_id`` is the peer's extension id for frames."""

    def __init__(self, number: int, remote_id: int, handshake: CarrierHandshake) -> None:
        self.number = number
        self.handshake = handshake
        self.pipe: Pipe | None = None
        """Set once the peer is authenticated."""
        self._remote_id = remote_id
        self._farewell = False

    def say_farewell(self) -> None:
        """Queue the empty frame: our client has left."""
        self._farewell = True

    def take(self, budget: int) -> Buffers:
        """BEP 10 messages to write now, about ``budget`` bytes of them."""
        buffers: Buffers = []
        if self._farewell:
            self._farewell = False
            buffers.append(extended_message(self._remote_id, b""))
        size = 0
        while size < budget and (frame := self._next_frame()) is not None:
            if len(frame) < _JOIN_BELOW:
                buffers.append(extended_message(self._remote_id, frame))
            else:
                buffers += (extended_head(self._remote_id, len(frame)), frame)
            size += BEP3_OVERHEAD + len(frame)
        if size and self.pipe is not None:
            self.pipe.frames_left(size)
        return buffers

    def _next_frame(self) -> bytes | None:
        frame = self.handshake.next_frame()
        if frame is None and self.pipe is not None:
            frame = self.pipe.core.next_frame(self.number)
        return frame
