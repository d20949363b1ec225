"""The pipe as its users see it: messages in order to and from one node, over whichever connections there are."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from torrentlm.errors import NetworkError
from torrentlm.records import Endpoint, InfoHash, NodeKey, SessionId
from torrentlm.wire.frames import BEP3_OVERHEAD, MAX_STREAMS, ByeCode
from torrentlm.wire.messages import Message
from torrentlm.wire.pipe import Event, MessageReceived, PeerClosed, PipeCore, PongReceived

_RTT_WEIGHT = 0.25


class Pipe:
    """One living pipe with one node. Made by the gateway; lives until ``aclose``, silence, or the loss of every
    connection.

    ``bytes_sent`` and ``bytes_received`` count everything that the pipe costs on the wire, framing included.
    """

    def __init__(
        self,
        core: PipeCore,
        host: str,
        info_hash: InfoHash,
        pump: Callable[[Pipe], None],
        ended: Callable[[Pipe], None],
    ) -> None:
        """``pump``: its frames may be sent now. ``ended``: called once, when it is dead."""
        self.core = core
        self.peer: NodeKey = core.peer.node
        self.endpoint = Endpoint(host, core.peer.port)
        """Where the peer listens; port 0 if it does not."""
        self.software = core.peer.software
        self.info_hash = info_hash
        """A torrent that both ends know: what a new connection for this pipe is dialed with."""
        self.rtt: float | None = None
        """Round trip in seconds, an exponentially weighted mean; None until the first answer."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.closed = trio.Event()
        self.used_at = trio.current_time()
        """When the last message was sent or received."""
        self.changed = trio.Event()
        """For the pool: a connection came or went, or the pipe is dead."""
        self._pump = pump
        self._ended = ended
        self._reason = f"the connection to {self.endpoint} is closed"
        self._inbox_in, self._inbox = trio.open_memory_channel[MessageReceived](
            math.inf
        )  # bounded by the core's credit
        self._progress = trio.Event()
        self._pings: dict[int, tuple[bytes, float]] = {}

    # -- for users ---------------------------------------------------------------------------------------------------

    async def send(self, message: Message, stream: int = 0) -> None:
        """Send a message; waits while a window's worth is queued on ``stream``.

        Tensor data is read until the message has left: do not change it. NetworkError once the pipe is dead,
        LocalProtocolError for a message that breaks a bound.
        """
        while not self.closed.is_set() and not self.core.writable(stream):
            await self._progress.wait()
        if self.closed.is_set():
            await trio.lowlevel.checkpoint_if_cancelled()
            raise NetworkError(self._reason)
        self.core.send(message, stream)
        self.used_at = trio.current_time()
        self._pump(self)
        await trio.lowlevel.checkpoint()

    async def receive(self) -> tuple[int, Message]:
        """The next message and its stream.

        NetworkError once the pipe is dead and everything that came has been taken.
        """
        try:
            event = await self._inbox.receive()
        except trio.EndOfChannel:
            raise NetworkError(self._reason) from None
        self.core.consumed(event)
        if self.core.ready_carriers():
            self._pump(self)
        return event.stream, event.message

    @staticmethod
    def stream_of(session: SessionId) -> int:
        """The stream for a session's messages: always the same one, never 0, so that sessions seldom wait for one
        another."""
        return 1 + int.from_bytes(session[:4], "big") % (MAX_STREAMS - 1)

    async def aclose(self) -> None:
        """Tell the peer and end the pipe. Messages not yet sent are dropped. Idempotent."""
        self.close(ByeCode.DONE, "closed by this node")
        await trio.lowlevel.checkpoint()

    # -- for the gateway ---------------------------------------------------------------------------------------------

    def close(self, code: ByeCode, reason: str) -> None:
        """End the pipe and say so to the peer."""
        self.core.close(code, reason)
        self.end(reason)

    def end(self, reason: str) -> None:
        """The pipe is dead: wake everybody who waits for it. The first reason counts."""
        if self.closed.is_set():
            return
        self._reason = f"the connection to peer {self.endpoint} ended: {reason}"
        self.core.close()
        self._pump(self)
        self.closed.set()
        self.changed.set()
        self._inbox_in.close()
        self._wake()
        self._ended(self)

    def take_frame(self, carrier: int, frame: memoryview) -> None:
        """A frame came. RemoteProtocolError if the peer broke a rule."""
        self.bytes_received += BEP3_OVERHEAD + len(frame)
        for event in self.core.receive_frame(carrier, frame):
            self._handle(event)
        self._wake()
        self._pump(self)

    def _handle(self, event: Event) -> None:
        if isinstance(event, MessageReceived):
            self.used_at = trio.current_time()
            self._inbox_in.send_nowait(event)
        elif isinstance(event, PongReceived):
            self._pong(event)
        elif isinstance(event, PeerClosed):
            self.end(f"the peer closed it ({event.reason or 'no reason given'})")

    def frames_left(self, size: int) -> None:
        """``size`` bytes of frames were handed to a connection."""
        self.bytes_sent += size
        self._wake()

    def ping(self, carrier: int, at_most_every: float) -> None:
        """Measure the round trip on a carrier, unless that was done just now."""
        now = trio.current_time()
        if carrier in self._pings and now - self._pings[carrier][1] < at_most_every:
            return
        token = int(now * 1e6).to_bytes(8, "big")
        self._pings[carrier] = (token, now)
        self.core.ping(carrier, token)

    def _pong(self, event: PongReceived) -> None:
        token, sent_at = self._pings.get(event.carrier, (b"", 0.0))
        if token == event.token and event.carrier == self.core.active:
            elapsed = trio.current_time() - sent_at
            self.rtt = elapsed if self.rtt is None else self.rtt + _RTT_WEIGHT * (elapsed - self.rtt)

    def carrier_closed(self, carrier: int) -> None:
        self._pings.pop(carrier, None)
        self.core.carrier_closed(carrier)
        self.changed.set()

    def _wake(self) -> None:
        if self._progress.statistics().tasks_waiting:
            self._progress.set()
            self._progress = trio.Event()
