"""One TCP connection with a peer, joined with our BitTorrent client's or carrying a pipe alone.

The life of a connection::

    joined     client and peer exchange messages through us
    piped      joined, and both ends' extended handshakes offered the pipe: frames travel between the messages
    detached   one end's client has left (it says so with an empty frame), or there never was one: frames only
    closed

    joined -> closed     either side closes
    joined -> piped      the peer's extended handshake names our extension
    piped  -> detached   our client closes its side, or the peer's empty frame comes
    any    -> closed     the peer closes, breaks a rule, or the pool closes it

Bytes from the peer never wait for the client: they queue here, up to a limit. Bytes to the peer leave in runs of
whole messages, with frames in between and small kernel buffers beneath while the pipe is in use; in bulk otherwise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway.carrier import Carrier
from torrentlm.gateway.inlet import Inlet
from torrentlm.gateway.outbox import Buffers, Outbox
from torrentlm.gateway.outlet import Outlet
from torrentlm.gateway.tcp import MAX_BUFFERS, TcpStream
from torrentlm.records import Endpoint, InfoHash
from torrentlm.wire.extension import PIPE_ID, bare_offer, make_offer, read_offer
from torrentlm.wire.peerwire import (
    CHOKE,
    HAVE,
    INTERESTED,
    UNCHOKE,
    Demux,
    Kind,
    Part,
    extended_message,
    port_message,
    signal_message,
)

if TYPE_CHECKING:
    from torrentlm.gateway.pool import Pool

READ_AHEAD = 1 << 20
"""How much of the client's may wait for the network before the client is no longer read."""
CLIENT_BUFFER = 1 << 20
INTERACTIVE_FOR = 1.0
"""Seconds after its last message during which a pipe counts as in use."""
FLUSH_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is moved at a time, in bytes: ``read`` from a socket, ``run`` of the client's messages between two
    frames, ``unsent`` and ``buffer`` in the kernel towards the network. ``reads``: how many before other tasks have a
    turn.
    """

    read: int
    run: int
    unsent: int
    buffer: int
    reads: int


BULK = Pace(read=512 << 10, run=256 << 10, unsent=256 << 10, buffer=1 << 20, reads=4)
"""Few calls: while only pieces are moved."""
INTERACTIVE = Pace(read=128 << 10, run=64 << 10, unsent=16 << 10, buffer=128 << 10, reads=1)
"""Short queues: while the pipe is in use."""


@dataclass(frozen=True, slots=True)
class Link:
    """Who and what a connection is for.

    ``peer``: where the peer is known to listen, or where it came from. ``torrent``: the torrent under its canonical
    hash; ``asked``: the hash by which the dialer greeted.
    """

    peer: Endpoint
    torrent: InfoHash
    asked: InfoHash
    dialed: bool


class Connection:
    """Owner of both sockets from the greetings on. ``run`` lives as long as the connection does."""

    def __init__(self, number: int, link: Link, remote: TcpStream, client: TcpStream | None, pool: Pool) -> None:
        self.number = number
        self.link = link
        self.carrier: Carrier | None = None
        self.heard_at = trio.current_time()
        self.settled = trio.Event()
        """The pipe's handshake succeeded, or it never will."""
        self.sent = 0
        """Bytes of the client that have left for the network."""
        self._remote = remote
        self._client = client
        self._pool = pool
        self._nursery: trio.Nursery
        self._scope = trio.CancelScope()
        self._client_scope = trio.CancelScope()
        self._peer_attached = client is not None
        self._pace = BULK
        self._outbox = Outbox(self._frames)
        self._to_network = Outlet(remote, self._next_batch)
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._to_client: Outlet | None = None
        self._set_pace(BULK)
        if client is not None:
            self._to_client = Outlet(client, self._next_for_client)
            client.set_buffers(CLIENT_BUFFER, CLIENT_BUFFER)

    @property
    def attached(self) -> bool:
        """BitTorrent messages travel on it, as far as this end knows."""
        return self._client is not None and self._peer_attached

    async def run(self) -> None:
        """Until the connection is closed, for whatever reason; both sockets are closed then."""
        stopped = True
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._ending, self._to_network)
                    if self._client is not None and self._to_client is not None:
                        self._nursery.start_soon(self._serve_client, self._client, self._to_client)
                    else:
                        offer = extended_message(0, bare_offer(self._pool.port))
                        self._outbox.put(Part(Kind.RUN, memoryview(offer)), offers=True)
                        self.pump()
                    await self._read_network()
                    self._nursery.cancel_scope.cancel()
            stopped = False
        finally:
            if stopped:
                self._pool.say_goodbye()
            self._remote.close()
            if self._client is not None:
                self._client.close()
            self.settled.set()
            self._pool.connection_closed(self)

    def let(self, open: bool) -> None:
        """Unchoke the peer, or choke it, whatever the client has said."""
        self._outbox.put_between(Part(Kind.RUN, memoryview(signal_message(UNCHOKE if open else CHOKE))))
        self.pump()

    def pump(self) -> None:
        """Write what waits for the network. Never waits, never raises: a broken connection ends by itself."""
        try:
            self._to_network.pump()
        except NetworkError:
            self._scope.cancel()

    def close(self) -> None:
        """End it now; what the kernel has is still delivered."""
        self._scope.cancel()

    # -- from the network --------------------------------------------------------------------------------------------

    async def _read_network(self) -> None:
        """Until the peer closes the connection or breaks a rule; then what it sent is still given to the client."""
        demux = Demux(PIPE_ID, run=None)
        inlet = Inlet(self._remote)
        try:
            while data := await inlet.read(self._pace.read, self._pace.reads):
                self.heard_at = trio.current_time()
                for part in demux.feed(data):
                    self._take_part(part)
                self._pump_client()
                await self._room_for_client()
        except (NetworkError, RemoteProtocolError):
            pass
        await self._dismiss_client()

    def _take_part(self, part: Part) -> None:
        kind = part.kind
        if kind is Kind.RUN or kind is Kind.OPEN or kind is Kind.PORT:
            self._for_client(part.data)
        elif kind is Kind.SIGNAL:
            if (code := part.data[4]) == HAVE:
                self._pool.turns.has_more(self.number)
            elif code > UNCHOKE:
                self._pool.turns.interest(self.number, code == INTERESTED)
            self._for_client(part.data)
        elif kind is Kind.FRAME:
            self._take_frame(part.data)
        else:
            self._take_offer(bytes(part.data))

    def _take_offer(self, payload: bytes) -> None:
        offer = read_offer(payload)
        self._for_client(memoryview(extended_message(0, offer.payload)))
        if offer.pipe_id is not None and self.carrier is None:
            self.carrier = Carrier(self.number, offer.pipe_id, self._pool.handshake(self.link))
            self._pool.carrier_opened(self)
            self.pump()

    def _take_frame(self, frame: memoryview) -> None:
        if self.carrier is None:
            raise RemoteProtocolError("a frame came before the extended handshake that allows it")
        if frame:
            self._pool.take_frame(self, self.carrier, frame)
        elif self._peer_attached:
            self._peer_attached = False
            if self._client is not None:
                self._nursery.start_soon(self._dismiss_client)
            self._pool.attachment_changed(self)

    # -- to the client -----------------------------------------------------------------------------------------------

    def _for_client(self, data: memoryview) -> None:
        if self._client is not None:
            self._queue.append(data)
            self._queued += len(data)

    def _next_for_client(self) -> Buffers:
        batch: Buffers = []
        size = 0
        while self._queue and size < BULK.run and len(batch) < MAX_BUFFERS:
            data = self._queue.popleft()
            batch.append(data)
            size += len(data)
        self._queued -= size
        return batch

    def _pump_client(self) -> None:
        if self._to_client is not None:
            try:
                self._to_client.pump()
            except NetworkError:
                self._client_scope.cancel()

    async def _room_for_client(self) -> None:
        while self._to_client is not None and self._queued > self._pool.policy.queue_to_client:
            await self._to_client.progress()

    async def _dismiss_client(self) -> None:
        """Give our client what there is for it, and then the end of the stream."""
        if self._to_client is not None:
            with trio.move_on_after(FLUSH_LIMIT):
                await self._to_client.flushed()
        self._client_scope.cancel()

    # -- from the client ---------------------------------------------------------------------------------------------

    async def _serve_client(self, client: TcpStream, outlet: Outlet) -> None:
        """Until the client leaves or is dismissed; the connection goes on without it if it carries a pipe."""
        with self._client_scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._leaving, outlet)
                await self._read_client(client)
                nursery.cancel_scope.cancel()
        if self._scope.cancel_called:
            return
        client.close()
        self._client = self._to_client = None
        self._pool.turns.leave(self.number)
        self._queue.clear()
        self._queued = 0
        outlet.abandon()
        with trio.move_on_after(FLUSH_LIMIT):  # what it said before it left arrives
            await self._to_network.flushed()
        if self.carrier is None or self._outbox.midway:
            self.close()
            return
        self._outbox.clear()
        if self._peer_attached:
            self.carrier.say_farewell()
            self.pump()
        self._pool.attachment_changed(self)

    async def _read_client(self, client: TcpStream) -> None:
        """Until the client closes its side."""
        demux, inlet = Demux(), Inlet(client)
        try:
            while data := await inlet.read(self._pace.read, self._pace.reads):
                for part in demux.feed(data):
                    if (outgoing := self._outgoing(part)) is not None:
                        self._outbox.put(outgoing, offers=part.kind is Kind.HANDSHAKE)
                self.pump()
                while self._outbox.waiting > READ_AHEAD:
                    await self._to_network.progress()
        except (NetworkError, RemoteProtocolError):
            return

    def _outgoing(self, part: Part) -> Part | None:
        """The client knows neither the pipe nor our ports: put them in. Nor does it know whose turn it is: what it says
        before that does not leave."""
        if part.kind is Kind.HANDSHAKE:
            message = extended_message(0, make_offer(bytes(part.data), self._pool.port))
        elif part.kind is Kind.PORT:
            message = port_message(self._pool.port)
        elif part.kind is Kind.SIGNAL and (code := part.data[4]) <= UNCHOKE:
            return part if self._pool.turns.offer(self.number, code == UNCHOKE) else None
        else:
            return part
        return Part(Kind.RUN, memoryview(message))

    # -- to the network ----------------------------------------------------------------------------------------------

    def _frames(self, budget: int) -> Buffers:
        return self.carrier.take(budget) if self.carrier is not None else []

    def _next_batch(self) -> Buffers:
        pipe = self.carrier.pipe if self.carrier is not None else None
        in_use = pipe is not None and trio.current_time() - pipe.used_at < INTERACTIVE_FOR
        pace = INTERACTIVE if in_use else BULK
        if pace is not self._pace:
            self._set_pace(pace)
        waiting = self._outbox.waiting
        batch = self._outbox.next_batch(pace.run)
        self.sent += waiting - self._outbox.waiting
        return batch

    def _set_pace(self, pace: Pace) -> None:
        self._pace = pace
        self._remote.set_buffers(pace.buffer, pace.buffer)
        self._remote.set_unsent_limit(pace.unsent)

    # -- ends --------------------------------------------------------------------------------------------------------

    async def _ending(self, outlet: Outlet) -> None:
        try:
            await outlet.run()
        except NetworkError:
            self._scope.cancel()

    async def _leaving(self, outlet: Outlet) -> None:
        try:
            await outlet.run()
        except NetworkError:
            self._client_scope.cancel()
