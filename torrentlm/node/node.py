"""One node: every service in one nursery, and the way of a message from a pipe to whom it is for.

::

    pipe ──▶ Record, Peers ─────────────▶ Membership.peers
         ──▶ AskSidecar, SidecarBytes ──▶ Membership.sidecars
         ──▶ a handle a client listens to ─▶ that client's session
         ──▶ everything else ────────────▶ Holder of the device ──▶ next holder's pipe, or this node again
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from torrentlm.compute.custom_code import require_allowed
from torrentlm.compute.machine import may_accelerate
from torrentlm.compute.precision import Cost
from torrentlm.compute.threads import first_import
from torrentlm.config import NodeConfig
from torrentlm.errors import ArtifactError, NetworkError, RemoteProtocolError, UnsupportedModelError
from torrentlm.gateway.gateway import Gateway
from torrentlm.gateway.pipe import Pipe
from torrentlm.manifest.magnet import Magnet
from torrentlm.node.adapters import NodeAdapters
from torrentlm.node.membership import Membership
from torrentlm.node.parts import Parts, Say
from torrentlm.node.prefetch import Prefetcher
from torrentlm.node.scrub import check_slowly
from torrentlm.node.services import open_services
from torrentlm.node.shelf import Shelf
from torrentlm.publish.published import published_files, stored_models
from torrentlm.records import Endpoint, InfoHash, NodeKey, SessionId, Span
from torrentlm.structured import single_error
from torrentlm.swarm.addresses import is_address
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.settings import PUBLIC_BOOTSTRAP
from torrentlm.swarm.space import Space
from torrentlm.swarm.store import Store
from torrentlm.wire.frames import ByeCode
from torrentlm.wire.messages import (
    AskSidecar,
    Fail,
    Message,
    NextHop,
    Open,
    Opened,
    Output,
    Peers,
    Record,
    SidecarBytes,
    Token,
)

if TYPE_CHECKING:
    from torrentlm.compute.device import Device
    from torrentlm.node.computing import Computing, Served

SESSIONS_EVERY_S = 1.0


class Node:
    """Made by :func:`open_node`. It is the holder's Outbox and the client's Links."""

    def __init__(self, parts: Parts, nursery: trio.Nursery) -> None:
        self.parts = parts
        self.key: NodeKey = parts.key
        self.memberships: dict[bytes, Membership] = {}
        self.adapters = NodeAdapters(parts, self.memberships)
        self.prefetcher = Prefetcher(parts, self.memberships)
        self._nursery = nursery
        self._computing: Computing | None = None
        self._starting = trio.Lock()
        self._listeners: dict[tuple[SessionId, NodeKey], trio.MemorySendChannel[Message]] = {}

    @property
    def endpoint(self) -> Endpoint:
        return self.parts.gateway.endpoint

    # -- models

    async def join(self, magnet: Magnet, *, timeout: float) -> Membership:
        """Take part in a model: find its peers and get its manifest. Raises NetworkError, ArtifactError."""
        membership = Membership(self.parts, magnet)
        self.memberships[membership.id] = membership
        self._nursery.start_soon(membership.run)
        await membership.obtain(timeout)
        return membership

    async def hold(self, membership: Membership) -> None:
        """Hold the blocks that the settings ask for, and serve them; a mirror has every file then."""
        weights = computing = None
        offload: tuple[int, ...] = ()
        config = self.parts.config
        if may_accelerate() or len(config.devices or ()) > 1:  # only torch knows; else fetching need not wait for it
            computing = await self._compute()
            weights = computing.weights_budget if computing.accelerates else None
            offload = computing.offload_budgets
        span = await membership.choose(weights, self._costs, offload)
        if span is not None:
            if computing is not None and (len(computing.lanes) > 1 or any(offload)):
                span = computing.fitting(membership, span)
            await self._serve(membership, span)
        if config.mirror:
            await membership.mirror()

    async def _serve(self, membership: Membership, span: Span) -> None:
        await trio.to_thread.run_sync(require_allowed, membership.folder, self.parts.config.allow_code)
        with single_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(membership.fetch, span)
                nursery.start_soon(self._serve_arriving, membership, span)

    async def _serve_arriving(self, membership: Membership, span: Span) -> None:
        """Serve each block from when its files are here, while others still arrive."""
        computing = await self._compute()  # takes seconds, which fetching can use
        served = await computing.open(membership, span)
        while waiting := [block for block in span if block not in served.arrived]:
            changed = membership.files.changed
            if blocks := [block for block in waiting if block in membership.files.ready]:
                if len(blocks) == len(waiting):  # until then it is fetching that takes the time
                    self.parts.say({"event": "progress", "what": "loading", "done": 0, "total": 1, "rate": 0})
                await self._add(computing, served, blocks)
                self.parts.say({"event": "blocks", "state": "served", "blocks": blocks})
            else:
                await changed.wait()
        await computing.settle(served)
        await computing.warn_of_overflow(served)

    async def _add(self, computing: Computing, served: Served, blocks: list[int]) -> None:
        """Files were believed by their stamps: where loading or the check fails, it may be the disk's fault."""
        try:
            await computing.add(served, blocks)
        except (ArtifactError, UnsupportedModelError):
            files = served.membership.files
            damaged = await files.hash(blocks)
            if not damaged:
                raise
            computing.relieve()
            await files.fetch(damaged)
            await computing.add(served, blocks)

    async def pin_published(self) -> None:
        """Never evict what was published here: it may be nowhere else."""
        store = self.parts.store
        self.parts.shelf.space.pin(await trio.to_thread.run_sync(published_files, store), "published")

    async def seed_all(self) -> None:
        """Seed whatever block files are on the disk, of whatever model."""
        store = self.parts.store
        for manifest, folder in await trio.to_thread.run_sync(lambda: list(stored_models(store))):
            with suppress(ArtifactError):  # published wrongly: whoever joins that model hears of it
                self.parts.shelf.seed(manifest.files, folder)

    def check_disk(self) -> None:
        """Keep hashing what is on the disk, slowly. To be called when what is to be held is loaded."""
        self._nursery.start_soon(check_slowly, self.parts.store, self._mend)

    def fetch_ahead(self) -> None:
        """Prefetch from now on, in the background, for the models that this node holds blocks of."""
        self._nursery.start_soon(self.prefetcher.run)

    async def _mend(self, name: str) -> None:
        """A damaged file: nobody gets anything of it any more, and it is fetched again, after the sessions that use it.

        One that no model of this node has is removed, unless it was published here: publishing again mends that.
        """
        shelf = self.parts.shelf
        shelf.damaged(name)
        users = [membership for membership in self.memberships.values() if membership.uses(name)]
        if users:
            self._nursery.start_soon(self._fetch_again, name, users)
        elif not shelf.space.pinned(name):
            await shelf.evict([name])

    async def _fetch_again(self, name: str, users: list[Membership]) -> None:
        """What comes is written where the file is mapped, so nobody may compute with it; then it is loaded anew."""
        await self._let_go(name)
        if (file := users[0].files.entry(name)) is not None:
            await users[0].files.fetch([file])
        await self._let_go(name)

    async def _let_go(self, name: str) -> None:
        """Return when the file is not in memory, which takes the end of the sessions that use it."""
        while self._computing is not None and self._computing.holds(name):
            if self.sessions or not self._computing.relieve():
                await trio.sleep(SESSIONS_EVERY_S)

    async def _compute(self) -> Computing:
        """The computing part, started when first needed."""
        async with self._starting:
            if self._computing is None:
                parts = self.parts
                make, devices = await trio.to_thread.run_sync(_import_computing, parts.config)
                changed, say = self._sessions_changed, parts.say
                self._computing = make(self.key, parts.config, devices, self, changed, self.adapters, say)
                await self._nursery.start(self._computing.run)
        return self._computing

    async def _costs(self, measure: bool) -> Mapping[str, Cost]:
        """What each precision costs on the devices; imports torch."""
        return await (await self._compute()).costs(measure)

    @property
    def computing(self) -> Computing | None:
        """The computing part; None as long as nothing was computed."""
        return self._computing

    @property
    def sessions(self) -> int:
        """Sessions that this node serves now."""
        return 0 if self._computing is None else self._computing.sessions

    # -- Outbox and Links

    async def connect(self, hop: NextHop) -> None:
        if hop.node != self.key:
            await self._pipe(hop)

    async def _pipe(self, hop: NextHop) -> Pipe:
        """The pipe to ``hop``; dialed with any of our models' hashes if there is none."""
        pipe = self.parts.gateway.pipes.get(hop.node)
        if pipe is not None:
            return pipe
        if not is_address(hop.host):
            raise NetworkError("a holder's host must be an IP address")
        membership = next(iter(self.memberships.values()), None)
        if membership is None:
            raise NetworkError("this node takes part in no model yet")
        return await self.parts.gateway.pipe_to(
            Endpoint(hop.host, hop.port), InfoHash(membership.magnet.v1 or b""), hop.node
        )

    async def send(self, node: NodeKey, message: Message, session: SessionId) -> None:
        if node == self.key:
            await self._take(self.key, message)
            return
        pipe = self.parts.gateway.pipes.get(node)
        if pipe is None:
            raise NetworkError("there is no connection to that peer any more")
        await pipe.send(message, pipe.stream_of(session))

    def listen(self, session: SessionId, holder: NodeKey, inbox: trio.MemorySendChannel[Message]) -> None:
        self._listeners[session, holder] = inbox

    def stop_listening(self, session: SessionId, holder: NodeKey) -> None:
        self._listeners.pop((session, holder), None)

    async def wait_lost(self, node: NodeKey) -> None:
        if node == self.key:
            await trio.sleep_forever()
        pipe = self.parts.gateway.pipes.get(node)
        if pipe is not None:
            await pipe.closed.wait()

    # -- pipes

    async def serve_pipes(self) -> None:
        """Greet every new pipe and take its messages, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for pipe in self.parts.gateway.incoming:
                nursery.start_soon(self._serve_pipe, pipe)

    async def _serve_pipe(self, pipe: Pipe) -> None:
        try:
            for membership in tuple(self.memberships.values()):
                await membership.peers.greet(pipe)
            while True:
                _stream, message = await pipe.receive()
                await self._take(pipe.peer, message)
        except RemoteProtocolError as error:
            pipe.close(ByeCode.PROTOCOL_ERROR, str(error))
        except NetworkError:
            pass  # whoever needs this peer hears of it from wait_lost or from send
        finally:
            for membership in tuple(self.memberships.values()):
                membership.peers.parted(pipe.peer)

    async def _take(self, sender: NodeKey, message: Message) -> None:
        if isinstance(message, Record | Peers):
            for membership in self.memberships.values():
                membership.peers.hear(sender, message)
            return
        if isinstance(message, AskSidecar | SidecarBytes):
            for membership in self.memberships.values():
                membership.sidecars.hear(sender, message, self._nursery)
            return
        if isinstance(message, Opened | Token | Output | Fail) and (
            inbox := self._listeners.get((message.session, sender))
        ):
            try:
                inbox.send_nowait(message)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._listeners.pop(
                    (message.session, sender)
                )  # a client that does not read loses its tokens, nobody else's
            return
        if isinstance(message, Open):
            self.prefetcher.saw(message.model, Span(message.first, message.last), trio.current_time())
        if self._computing is not None:
            await self._computing.handle(sender, message)
        elif isinstance(message, Open):
            refusal = Fail(message.session, message.epoch, "no_block", "this peer serves no blocks", message.first)
            await self.send(sender, refusal, message.session)

    def _sessions_changed(self) -> None:
        for membership in self.memberships.values():
            membership.peers.publish(sessions=self.sessions)


def _import_computing(config: NodeConfig) -> tuple[type[Computing], tuple[Device, ...]]:
    """The class, and the devices to compute on."""
    with first_import():
        from torrentlm.node.computing import Computing
        from torrentlm.node.devices import open_devices

        return Computing, open_devices(config)


@asynccontextmanager
async def open_node(
    config: NodeConfig, say: Say = lambda event: None, open_store: Callable[[Path], Store] = Store
) -> AsyncIterator[Node]:
    """Start every service of a node; stop them all on the way out.

    Raises StorageError (data folder), NetworkError (port in use).
    """
    bootstrap = PUBLIC_BOOTSTRAP if config.dht_bootstrap is None else config.dht_bootstrap
    with open_store(config.data) as store, single_error():
        identity = store.identity()
        async with open_services() as start:
            gateway = Gateway(identity, host=config.host, port=config.port)
            await start(gateway.run)
            limits = {"download_limit": config.download, "upload_limit": config.upload}
            swarm = Swarm(gateway.proxy, identity, bootstrap, **limits)
            await start(swarm.run)
            gateway.torrents = swarm
            async with trio.open_nursery() as nursery:
                space = Space(store, config.disk)
                shelf = Shelf(store, space, swarm, gateway, lambda why: say({"event": "waiting", "why": why}))
                node = Node(Parts(identity.node, config, store, swarm, gateway, shelf, say), nursery)
                await node.pin_published()
                nursery.start_soon(node.serve_pipes)
                yield node
                nursery.cancel_scope.cancel()
