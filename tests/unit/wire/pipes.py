"""Two pipe cores and the connections between them, as plain queues."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torrentlm.records import NodeKey
from torrentlm.wire.frames import Hello
from torrentlm.wire.handshake import Authenticated
from torrentlm.wire.messages import Message
from torrentlm.wire.pipe import Event, MessageReceived, PipeCore
from torrentlm.wire.streams import Limits

LOW, HIGH = NodeKey(b"\1" * 32), NodeKey(b"\2" * 32)
LEADER, FOLLOWER = 0, 1

SMALL = Limits(
    message=4000, window=512, reserve=8000, unacked=1500, ack_bytes=256, ack_frames=4, body=64
)  # everything happens after a few frames


def authenticated(
    node: NodeKey, generation: int = 0, peer_generation: int = 0, instance: bytes = bytes(8)
) -> Authenticated:
    return Authenticated(Hello(node, bytes(32), instance), generation, peer_generation, 1)


@dataclass
class Carrier:
    """One TCP connection: what is under way to each side, and which sides still have it open."""

    to: tuple[deque[bytes], deque[bytes]] = field(default_factory=lambda: (deque(), deque()))
    open: list[bool] = field(default_factory=lambda: [True, True])


class Pair:
    """A leader's and a follower's core with any number of carriers between them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.cores = (PipeCore(LOW, authenticated(HIGH), limits), PipeCore(HIGH, authenticated(LOW), limits))
        self.carriers: dict[int, Carrier] = {}
        self.events: tuple[list[Event], list[Event]] = ([], [])

    def open(self) -> int:
        number = len(self.carriers)
        self.carriers[number] = Carrier()
        for core in self.cores:
            core.carrier_opened(number)
        return number

    def close(self, number: int, side: int) -> None:
        """One side sees the connection end; the other may still read what was sent before."""
        carrier = self.carriers[number]
        carrier.open[side] = False
        carrier.to[side].clear()
        self.cores[side].carrier_closed(number)

    def transmit(self, number: int, side: int) -> bool:
        """One frame from a core into a connection."""
        carrier = self.carriers[number]
        if not carrier.open[side]:
            return False
        frame = self.cores[side].next_frame(number)
        if frame is None:
            return False
        if carrier.open[1 - side]:
            carrier.to[1 - side].append(frame)
        return True

    def deliver(self, number: int, side: int) -> bool:
        """One frame out of a connection into a core."""
        waiting = self.carriers[number].to[side]
        if not waiting:
            return False
        self.events[side].extend(self.cores[side].receive_frame(number, memoryview(waiting.popleft())))
        return True

    def settle(self) -> None:
        """Move frames until nothing moves."""
        moving = True
        while moving:
            moving = False
            for number in self.carriers:
                for side in (LEADER, FOLLOWER):
                    moving = self.transmit(number, side) or moving
                    moving = self.deliver(number, side) or moving

    def received(self, side: int) -> list[tuple[int, Message]]:
        return [(event.stream, event.message) for event in self.events[side] if isinstance(event, MessageReceived)]

    def take(self, side: int) -> list[MessageReceived]:
        """Messages that came to a side and are not taken yet. They still hold their credit."""
        taken = [event for event in self.events[side] if isinstance(event, MessageReceived)]
        self.events[side][:] = [event for event in self.events[side] if not isinstance(event, MessageReceived)]
        return taken


def connected(limits: Limits | None = None) -> Pair:
    pair = Pair(limits)
    pair.open()
    pair.settle()
    return pair
