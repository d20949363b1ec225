"""All pipes of the node, and the connections that carry them: one pipe per peer, kept warm, moved, revived, closed
when idle."""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Protocol

import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway.carrier import Carrier
from torrentlm.gateway.connection import Connection, Link
from torrentlm.gateway.pipe import Pipe
from torrentlm.gateway.policy import Policy
from torrentlm.gateway.settle import Candidate, surplus
from torrentlm.gateway.turns import Turns
from torrentlm.records import Endpoint, InfoHash, NodeKey
from torrentlm.wire.frames import ByeCode, Hello
from torrentlm.wire.handshake import Authenticated, CarrierHandshake
from torrentlm.wire.pairing import PipeTable

Verify = Callable[[NodeKey, bytes, bytes], bool]
Redial = Callable[[Endpoint, InfoHash], Awaitable[Connection]]


class Signer(Protocol):
    """A node's identity as far as the pool needs it."""

    node: NodeKey

    def sign(self, data: bytes) -> bytes: ...


class Pool:
    """Owner of every :class:`Pipe`.

    Connections report to it; ``redial`` makes a new one for a pipe that lost its last.
    """

    def __init__(self, identity: Signer, verify: Verify, policy: Policy, redial: Redial) -> None:
        self.policy = policy
        self.port = 0
        """Where this node listens, as told to peers."""
        self.turns = Turns()
        self.pipes: dict[NodeKey, Pipe] = {}
        self.nursery: trio.Nursery
        """The gateway's, in which the pipes' tasks live."""
        self._opened, self.incoming = trio.open_memory_channel[Pipe](math.inf)
        self._identity = identity
        self._verify = verify
        self._redial = redial
        self._table = PipeTable(identity.node)
        self._instance = secrets.token_bytes(8)
        self._software = f"torrentlm/{version('torrentlm')}"
        self._connections: dict[int, Connection] = {}  # those with a carrier, by number

    def say_goodbye(self) -> None:
        """The gateway is being stopped: tell every peer while there are connections. Idempotent."""
        for pipe in tuple(self.pipes.values()):
            pipe.close(ByeCode.SHUTDOWN, "the node is shutting down")

    def close(self) -> None:
        """No pipe will be made any more: ``incoming`` ends."""
        self.say_goodbye()
        self._opened.close()

    def find(self, endpoint: Endpoint) -> Pipe | None:
        """The pipe with the node that listens there."""
        return next((pipe for pipe in self.pipes.values() if pipe.endpoint == endpoint), None)

    # -- connections report ------------------------------------------------------------------------------------------

    def handshake(self, link: Link) -> CarrierHandshake:
        """A fresh one for a connection whose peer offered the pipe."""
        hello = Hello(self._identity.node, secrets.token_bytes(32), self._instance, self.port, self._software)
        return CarrierHandshake(
            hello,
            dialer=link.dialed,
            info_hash=link.asked,
            sign=self._identity.sign,
            verify=lambda node, message, signature: self._verify(node, signature, message),
            generation=self._table.generation,
        )

    def carrier_opened(self, connection: Connection) -> None:
        """Its handshake has begun; it is closed if that takes too long."""
        self._connections[connection.number] = connection
        self.nursery.start_soon(self._limit_handshake, connection)

    async def _limit_handshake(self, connection: Connection) -> None:
        with trio.move_on_after(self.policy.hello_limit):
            await connection.settled.wait()
        if not connection.settled.is_set():
            connection.close()

    def take_frame(self, connection: Connection, carrier: Carrier, frame: memoryview) -> None:
        """A frame came on a connection. RemoteProtocolError ends the connection."""
        if carrier.pipe is None:
            established = carrier.handshake.receive_frame(frame)
            if established is not None:
                self._admit(connection, carrier, established)
            connection.pump()
            return
        try:
            carrier.pipe.take_frame(carrier.number, frame)
        except RemoteProtocolError as error:
            carrier.pipe.close(ByeCode.PROTOCOL_ERROR, str(error))
            raise

    def attachment_changed(self, connection: Connection) -> None:
        """A client left the connection, ours or the peer's."""
        carrier = connection.carrier
        if carrier is not None and carrier.pipe is not None:
            self._settle(carrier.pipe)

    def connection_closed(self, connection: Connection) -> None:
        self.turns.leave(connection.number)
        self._connections.pop(connection.number, None)
        carrier = connection.carrier
        if carrier is not None and carrier.pipe is not None:
            carrier.pipe.carrier_closed(connection.number)
            self._pump(carrier.pipe)

    # -- pipes -------------------------------------------------------------------------------------------------------

    def _admit(self, connection: Connection, carrier: Carrier, established: Authenticated) -> None:
        admission = self._table.admit(connection.number, established)
        if admission.is_new:
            pipe = Pipe(admission.core, connection.link.peer.host, connection.link.asked, self._pump, self._ended)
            if admission.replaced is not None:
                self.pipes[pipe.peer].end("the peer has started a new one")
            self.pipes[pipe.peer] = pipe
            self._opened.send_nowait(pipe)
            self.nursery.start_soon(self._keep, pipe)
        pipe = self.pipes[established.peer.node]
        carrier.pipe = pipe
        pipe.changed.set()
        pipe.ping(connection.number, self.policy.ping_every)
        connection.settled.set()
        self._settle(pipe)
        self._pump(pipe)

    def _carriers(self, pipe: Pipe) -> list[Connection]:
        return [self._connections[number] for number in pipe.core.carriers if number in self._connections]

    def _pump(self, pipe: Pipe) -> None:
        for number in pipe.core.ready_carriers():
            if connection := self._connections.get(number):
                connection.pump()

    def _settle(self, pipe: Pipe) -> None:
        """The leader closes what is too many and moves the pipe to what stays."""
        if not pipe.core.leader or pipe.closed.is_set():
            return
        connections = self._carriers(pipe)
        excess = surplus([Candidate(c.number, c.link.torrent, c.attached, c.link.dialed) for c in connections])
        if pipe.core.active in excess:
            pipe.core.select(next(c.number for c in connections if c.number not in excess))
            self._pump(pipe)
        for connection in connections:
            if connection.number in excess:
                connection.close()

    async def _keep(self, pipe: Pipe) -> None:
        """One pipe's life: pings, silence, idleness, and a new connection when the last one is lost."""
        while not pipe.closed.is_set():
            with trio.move_on_after(self.policy.ping_every):
                await pipe.changed.wait()
            if pipe.closed.is_set():
                return
            pipe.changed = trio.Event()
            if pipe.core.carriers:
                self._look_after(pipe)
            else:
                await self._revive(pipe)

    def _look_after(self, pipe: Pipe) -> None:
        now = trio.current_time()
        connections = self._carriers(pipe)
        silent = [c for c in connections if now - c.heard_at > self.policy.silence_limit]
        if silent and len(silent) == len(connections):
            pipe.end(f"the peer has said nothing for {self.policy.silence_limit:g} s")
        for connection in silent:
            connection.close()
        if not any(c.attached for c in connections) and now - pipe.used_at > self.policy.idle_limit:
            pipe.close(ByeCode.IDLE, "it was idle")
        if pipe.closed.is_set():
            return
        pipe.core.flush_ack()
        for connection in connections:
            if connection not in silent:
                pipe.ping(connection.number, self.policy.ping_every)
        self._pump(pipe)

    async def _revive(self, pipe: Pipe) -> None:
        """Both ends try to connect again, the leader first; within the grace, or the pipe is dead."""
        reason = "the connection was lost"
        with trio.move_on_after(self.policy.grace):
            if not pipe.core.leader:
                await self._wait_carrier(pipe, self.policy.grace / 3)
            if not pipe.core.carriers and not pipe.closed.is_set():
                try:
                    connection = await self._redial(pipe.endpoint, pipe.info_hash)
                    await connection.settled.wait()
                except NetworkError as error:
                    reason = str(error)
                    await self._wait_carrier(pipe, self.policy.grace / 3)
        if not pipe.core.carriers:
            pipe.end(reason)

    async def _wait_carrier(self, pipe: Pipe, limit: float) -> None:
        """Give the peer time to dial."""
        with trio.move_on_after(limit):
            while not pipe.core.carriers and not pipe.closed.is_set():
                await pipe.changed.wait()
                pipe.changed = trio.Event()

    def _ended(self, pipe: Pipe) -> None:
        self._table.forget(pipe.core)
        if self.pipes.get(pipe.peer) is pipe:
            del self.pipes[pipe.peer]
        for connection in self._carriers(pipe):
            if not connection.attached:
                connection.close()
