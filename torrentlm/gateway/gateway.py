"""The gateway: owner of the node's TCP and UDP port, between the network and the node's own BitTorrent client.

::

    network ──TCP──▶ greeting ──▶ torrents.connect_peer ──▶ client dials by proxy ─┐
                                                                                   ├─▶ Connection ◀─▶ Pool ◀─▶ Pipe
    client ──SOCKS5──▶ its greeting names the torrent ──▶ dial ────────────────────┘
    network ◀──UDP──▶ DatagramRelay ◀──SOCKS5──▶ client's DHT
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway import socks, tcp
from torrentlm.gateway.connection import Connection, Link
from torrentlm.gateway.greeting import PIPE_RESERVED, PeerTag, read_greeting
from torrentlm.gateway.pipe import Pipe
from torrentlm.gateway.policy import Policy
from torrentlm.gateway.pool import Pool, Signer, Verify
from torrentlm.gateway.ports import Ports, open_ports
from torrentlm.gateway.rendezvous import Key, Rendezvous, Visitor
from torrentlm.gateway.tcp import TcpStream
from torrentlm.gateway.tunnel import tunnel
from torrentlm.gateway.udp import DatagramRelay
from torrentlm.records import Endpoint, InfoHash, NodeKey
from torrentlm.swarm.addresses import is_address
from torrentlm.swarm.identity import verify as verify_signature
from torrentlm.swarm.settings import Proxy
from torrentlm.wire.peerwire import GREETING_BYTES, PROTOCOL, Greeting

_NO_TORRENT = InfoHash(bytes(20))
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104


class Torrents(Protocol):
    """The node's BitTorrent client as far as the gateway needs it."""

    def canonical(self, info_hash: bytes) -> InfoHash | None:
        """One name per torrent: the hash by which the client greets. None if the client does not have it."""

    def had_first(self, info_hash: bytes) -> bool:
        """Whether the client had all of the torrent when it started it."""

    def connect_peer(self, info_hash: bytes, endpoint: Endpoint) -> None:
        """Have the client dial ``endpoint`` through the proxy. Returns at once."""


class Gateway:
    """``run`` is a service of the node's nursery; ``endpoint`` and ``proxy`` are set once it has started.

    ``torrents`` may be set later; until then no torrent is known. ``pipes`` and ``incoming`` show the living pipes
    and those newly made, by either side. With TORRENTLM_LOOPBACK_ONLY=1 (see Policy) it talks to nothing but
    loopback.
    """

    def __init__(
        self,
        identity: Signer,
        *,
        host: str = "0.0.0.0",  # noqa: S104
        port: int = 0,
        torrents: Torrents | None = None,
        policy: Policy | None = None,
        verify: Verify = verify_signature,
    ) -> None:
        self.endpoint = Endpoint(host, port)
        self.proxy: Proxy
        self.torrents = torrents
        self._node = identity.node
        self._policy = policy or Policy.from_environment(os.environ)
        self._pool = Pool(identity, verify, self._policy, self._dial_pipe)
        self._rendezvous = Rendezvous()
        self._connections: dict[int, Connection] = {}
        self._numbers = 0
        self._pending: OrderedDict[TcpStream, trio.CancelScope] = OrderedDict()  # connections that have not greeted yet
        self._own: set[Endpoint] = set()
        self._dials_from: set[tuple[Endpoint, Endpoint]] = set()  # dials under way: our end, the target
        self._pipe_dials: dict[Endpoint, trio.Event] = {}
        self._relay: DatagramRelay
        self._nursery: trio.Nursery

    @property
    def pipes(self) -> Mapping[NodeKey, Pipe]:
        return self._pool.pipes

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Connections with peers that are open now."""
        return tuple(self._connections.values())

    @property
    def incoming(self) -> trio.MemoryReceiveChannel[Pipe]:
        return self._pool.incoming

    def is_own(self, endpoint: Endpoint) -> bool:
        """Whether this node answers there, as far as is known."""
        if endpoint in self._own:
            return True
        host = self.endpoint.host
        here = endpoint.is_loopback if host in _WILDCARDS else endpoint.host == host
        return here and endpoint.port == self.endpoint.port

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. NetworkError if the port cannot be had."""
        ports = open_ports(self.endpoint.host, self.endpoint.port)
        try:
            inner = tcp.listen("127.0.0.1", 0)
            with inner:
                self.endpoint, self._pool.port = ports.endpoint, ports.endpoint.port
                self.proxy = socks.make_proxy(inner.getsockname()[1])
                self._relay = DatagramRelay(ports.udp, self._policy)
                async with trio.open_nursery() as nursery:
                    self._nursery = self._pool.nursery = nursery
                    self._nursery.start_soon(self._relay.run)
                    self._nursery.start_soon(self._pool.turns.run)
                    self._nursery.start_soon(self._accept_peers, ports)
                    self._nursery.start_soon(self._accept_client, inner)
                    task_status.started()
        finally:
            self._pool.close()
            ports.close()

    # -- from the network --------------------------------------------------------------------------------------------

    async def _accept_peers(self, ports: Ports) -> None:
        while True:
            stream = await tcp.accept(ports.tcp)
            if self._policy.allows(stream.remote.host) and self._has_room(stream.remote.host):
                self._nursery.start_soon(self._handle, stream, self._welcome)
            else:
                stream.abort()

    def _has_room(self, host: str) -> bool:
        same_host = sum(connection.link.peer.host == host for connection in self._connections.values())
        return len(self._connections) < self._policy.connections and same_host < self._policy.connections_per_host

    async def _handle(self, stream: TcpStream, serve: Callable[[TcpStream], Awaitable[None]]) -> None:
        """Own a stream until it is served or handed on."""
        try:
            await serve(stream)
        except (NetworkError, RemoteProtocolError):
            pass  # it ends here, and costs nobody else anything
        finally:
            stream.close()

    async def _welcome(self, stream: TcpStream) -> None:
        """An incoming connection, from its first byte on."""
        greeting = await self._first_words(stream)
        torrent = self._canonical(greeting.info_hash)
        if torrent is None:
            return
        tag = PeerTag.parse(greeting.peer_id)
        if tag is not None and tag.key == self._tag.key:
            targets = [target for local, target in self._dials_from if local == stream.remote]
            if len(targets) == 1:  # two dials to different targets may have the same port of ours
                self._own.add(targets[0])
            return
        peer = Endpoint(stream.remote.host, tag.port) if tag and tag.port else stream.remote
        if tag is not None and tag.pipe_only:
            await stream.send_all(self._pipe_greeting(greeting.info_hash).to_bytes())
            await self._serve(Link(peer, torrent, greeting.info_hash, dialed=False), stream.detach(), None)
        else:
            source = stream.remote
            await self._join(Key(peer, torrent), Visitor(stream.detach(), greeting, peer), source, tag)

    async def _first_words(self, stream: TcpStream) -> Greeting:
        """Its greeting; if too many are awaited at a time, the connection that has been silent for longest is given
        up."""
        if len(self._pending) >= self._policy.pending_greetings:
            self._pending.popitem(last=False)[1].cancel()
        with trio.CancelScope() as scope:
            self._pending[stream] = scope
            try:
                return await read_greeting(stream, self._policy.greeting_limit)
            finally:
                self._pending.pop(stream, None)
        raise NetworkError(f"{stream.remote} was given up for newer connections")

    async def _join(self, key: Key, visitor: Visitor, source: Endpoint, tag: PeerTag | None) -> None:
        """Have our client come for an incoming connection; the task that serves the client then takes it over.

        libtorrent, once a seed, never again dials a peer that it knew as a seed, though that may have lost its file. So
        if it does not come, it is told of the visitor under the port that it came from: there it is a stranger.
        """
        try:
            dial = self._rendezvous.dial(key)
            if dial is not None and tag is not None and tag.key < self._tag.key:
                self._rendezvous.hand_over(dial, visitor)
            if dial is not None or self._attached(key):
                return
            with trio.move_on_after(self._policy.join_limit):
                if tag is not None:
                    with trio.move_on_after(self._policy.second_call):
                        await self._call_client(key, visitor)
                if not visitor.taken.is_set():
                    self._rendezvous.add_source_port(source)
                    await self._call_client(Key(source, key.torrent), visitor)
        finally:
            if not visitor.taken.is_set():
                visitor.stream.close()

    async def _call_client(self, key: Key, visitor: Visitor) -> None:
        with self._rendezvous.waiting(key, visitor):
            if self.torrents is not None:
                self.torrents.connect_peer(visitor.greeting.info_hash, key.peer)
            await visitor.taken.wait()

    # -- from the client ---------------------------------------------------------------------------------------------

    async def _accept_client(self, listener: socket.socket) -> None:
        while True:
            stream = await tcp.accept(listener)
            self._nursery.start_soon(self._handle, stream, self._serve_proxy)

    async def _serve_proxy(self, client: TcpStream) -> None:
        """One request of the client to its proxy."""
        with trio.move_on_after(self._policy.greeting_limit) as scope:
            request = await socks.negotiate(client, self.proxy)
        if scope.cancelled_caught:
            return
        if request.command == socks.Command.UDP_ASSOCIATE:
            await self._relay.associate(client, request)
        elif request.command != socks.Command.CONNECT:
            await socks.reply(client, socks.Reply.COMMAND_NOT_SUPPORTED)
        elif (refusal := self._refusal(request.target)) is not None:
            await socks.reply(client, refusal)
        else:
            await socks.reply(client, socks.Reply.SUCCEEDED)
            await self._serve_client(client, request.target)

    def _refusal(self, target: Endpoint) -> socks.Reply | None:
        """Why a request is refused before the client has said what it is for; None if it is not."""
        if self._rendezvous.expects(target):
            return None
        if self.is_own(target) or self._rendezvous.is_source_port(target):
            return socks.Reply.REFUSED
        if is_address(target.host) and not self._policy.allows(target.host):
            return socks.Reply.NOT_ALLOWED
        return None

    async def _serve_client(self, client: TcpStream, target: Endpoint) -> None:
        """The client believes that it has reached ``target``: only its greeting says which torrent it wants there."""
        head = b""
        with trio.move_on_after(self._policy.greeting_limit):
            head = await client.receive(GREETING_BYTES)
            if head.startswith(PROTOCOL[:1]):
                head += await client.receive_exactly(GREETING_BYTES - len(head))
        if not head.startswith(PROTOCOL):
            await tunnel(client, target, head, self._policy)
            return
        greeting = Greeting.parse(head)
        torrent = self._canonical(greeting.info_hash)
        if torrent is None:
            return
        key = Key(target, torrent)
        try:
            await self._introduce(client, key, greeting)
        except (NetworkError, RemoteProtocolError):
            # A greeting for no torrent counts in libtorrent as a failed attempt, after which it waits longer each
            # time; the mere end of the stream would not.
            await client.send_all(greeting.naming(_NO_TORRENT).to_bytes())

    async def _introduce(self, client: TcpStream, key: Key, greeting: Greeting) -> None:
        """Join the client, which said ``greeting``, with the peer."""
        link, remote, theirs = await self._reach(key, replace(greeting, peer_id=self._tag.to_peer_id()))
        try:
            # The client drops a peer that names a hybrid torrent by its other hash, so it hears the one that it said.
            known = self._canonical(theirs.info_hash) == key.torrent
            await client.send_all((theirs.naming(greeting.info_hash) if known else theirs).to_bytes())
        except BaseException:
            remote.close()
            raise
        await self._serve(link, remote, client.detach())

    async def _reach(self, key: Key, ours: Greeting) -> tuple[Link, TcpStream, Greeting]:
        """The peer's stream and greeting, ours sent: its visitor if one waits, else dialed."""
        visitor = self._rendezvous.take_visitor(key)
        if visitor is None:
            if self._attached(key) or self._rendezvous.dial(key):
                raise NetworkError(f"{key.peer} is connected for this torrent already")
            reached = None
            with self._rendezvous.dialing(key) as dial, dial.scope:
                reached = await self._greet(key.peer, ours)
            visitor = dial.visitor
            if reached is not None and visitor is None:
                return Link(key.peer, key.torrent, ours.info_hash, dialed=True), *reached
            if reached is not None:
                reached[0].close()
            if visitor is None:
                raise NetworkError(f"the dial to {key.peer} was given up")
        try:
            await visitor.stream.send_all(ours.naming(visitor.greeting.info_hash).to_bytes())
        except BaseException:
            visitor.stream.close()
            raise
        link = Link(visitor.peer, key.torrent, visitor.greeting.info_hash, dialed=False)
        return link, visitor.stream, visitor.greeting

    # -- pipes -------------------------------------------------------------------------------------------------------

    async def pipe_to(self, endpoint: Endpoint, info_hash: InfoHash, node: NodeKey | None = None) -> Pipe:
        """The pipe with the node at ``endpoint``: the one there is, else over a new connection that carries nothing
        else.

        ``info_hash``: a torrent that both have, normally the model's. ``node``: who it must be, if that is known.
        NetworkError if it cannot be had within the limits of the policy.
        """
        while True:
            pipe = self.pipes.get(node) if node is not None else self._pool.find(endpoint)
            if pipe is not None:
                await trio.lowlevel.checkpoint()
                return pipe
            underway = self._pipe_dials.get(endpoint)
            if underway is None:
                break
            await underway.wait()
        done = self._pipe_dials[endpoint] = trio.Event()
        try:
            connection = await self._dial_pipe(endpoint, info_hash)
            await connection.settled.wait()
        finally:
            del self._pipe_dials[endpoint]
            done.set()
        pipe = connection.carrier.pipe if connection.carrier is not None else None
        if pipe is None or pipe.closed.is_set():
            raise NetworkError(f"{endpoint} answered but does not speak the pipe's protocol")
        if node is not None and pipe.peer != node:
            raise NetworkError(f"another node than the one looked for answers at {endpoint}")
        return pipe

    async def _dial_pipe(self, endpoint: Endpoint, info_hash: InfoHash) -> Connection:
        """A connection for the pipe only; its handshake goes on in the background."""
        torrent = self._canonical(info_hash) or info_hash
        stream, answer = await self._greet(endpoint, self._pipe_greeting(info_hash))
        if answer.info_hash != info_hash or PeerTag.parse(answer.peer_id) is None:
            stream.close()
            raise NetworkError(f"{endpoint} is no TorrentLM node")
        connection = self._connect(Link(endpoint, torrent, info_hash, dialed=True), stream, None)
        self._nursery.start_soon(self._run, connection)
        return connection

    # -- connections -------------------------------------------------------------------------------------------------

    async def _greet(self, endpoint: Endpoint, greeting: Greeting) -> tuple[TcpStream, Greeting]:
        """Dial, greet, and wait for the answer. NetworkError or RemoteProtocolError if there is none in time."""
        if self.is_own(endpoint):
            raise NetworkError(f"{endpoint} is this node itself")
        if not self._policy.allows(endpoint.host):
            raise NetworkError(f"{endpoint} is outside the networks that this node may talk to")
        stream = None
        with trio.move_on_after(self._policy.dial_limit):
            stream = await tcp.dial(endpoint)
        if stream is None:
            raise NetworkError(f"{endpoint} did not answer within {self._policy.dial_limit:g} s")
        dial = (stream.local, endpoint)
        self._dials_from.add(dial)
        try:
            await stream.send_all(greeting.to_bytes())
            return stream, await read_greeting(stream, self._policy.greeting_limit)
        except BaseException:
            stream.close()
            raise
        finally:
            self._dials_from.discard(dial)

    async def _serve(self, link: Link, remote: TcpStream, client: TcpStream | None) -> None:
        await self._run(self._connect(link, remote, client))

    def _connect(self, link: Link, remote: TcpStream, client: TcpStream | None) -> Connection:
        self._numbers += 1
        connection = self._connections[self._numbers] = Connection(self._numbers, link, remote, client, self._pool)
        if client is None:
            self._nursery.start_soon(self._limit_settling, connection)
        elif self.torrents is not None and self.torrents.had_first(link.torrent):
            self._pool.turns.enter(connection.number, link.torrent, link.peer, connection)
        return connection

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            del self._connections[connection.number]

    async def _limit_settling(self, connection: Connection) -> None:
        """Close a connection that is for a pipe alone if it does not get one."""
        with trio.move_on_after(self._policy.hello_limit):
            await connection.settled.wait()
            return
        connection.close()

    def _attached(self, key: Key) -> bool:
        """Whether BitTorrent messages for this torrent already travel between the client and that peer."""
        links = (connection.link for connection in self._connections.values() if connection.attached)
        return any((link.peer, link.torrent) == key for link in links)

    def _canonical(self, info_hash: bytes) -> InfoHash | None:
        return self.torrents.canonical(info_hash) if self.torrents is not None else None

    @property
    def _tag(self) -> PeerTag:
        return PeerTag.of(self._node, self.endpoint.port, pipe_only=False)

    def _pipe_greeting(self, info_hash: InfoHash) -> Greeting:
        tag = replace(self._tag, pipe_only=True)
        return Greeting(PIPE_RESERVED, info_hash, tag.to_peer_id())
