"""Who else takes part in a model: endpoints from every source, dialed; pipes, greeted; records, kept and sent.

Endpoints come from the magnet's ``x.pe``, the operator, the last session, the DHT (BEP 5, under both of the model's
hashes) and gossip. Each is met once by a pipe; what it answers is its record. Peers that we know by key alone are
looked up in the DHT (BEP 44).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.gateway.pipe import Pipe
from torrentlm.node.parts import Parts
from torrentlm.records import Endpoint, InfoHash, NodeKey, PeerRecord
from torrentlm.route.registry import Candidate, Registry, Snapshot
from torrentlm.swarm.addresses import is_address
from torrentlm.swarm.discovery import Discovery, Source
from torrentlm.wire.messages import Contact, Message, Peers, Record

MEET_EVERY_S = 0.25
MEET_AT_ONCE = 16
DHT_LOOKUP_EVERY_S = 15.0
DHT_LOOKUP_S = 10.0
MAX_GOSSIP = 32
MAX_KEYS = 1000
RECORD_EVERY_S = 0.5
"""Changes of our record within this time go out as one."""
INTRODUCE_PAUSE_S = 0.1
INTRODUCE_TO = 16
"""So many peers hear from us of one that begins to have blocks: who hears of it connects and knows the next."""
PUT_EVERY_S = 45 * 60.0
"""DHT nodes drop an item that was not put again for two hours, and come and go themselves; BEP 44 advises an hour."""


def contact_of(peer: Candidate) -> Contact:
    return Contact(peer.node, peer.endpoint.host, peer.endpoint.port)


class ModelPeers:
    """The peers of one model as this node knows them, and this node as they know it. ``run`` is a service."""

    def __init__(self, parts: Parts, hashes: Sequence[InfoHash], record: PeerRecord) -> None:
        self.registry = Registry(parts.key)
        self._parts = parts
        self._hashes = tuple(hashes)
        self._record = record
        self._changed = trio.Event()
        self._discovery = Discovery(own=parts.gateway.is_own)
        self._meeting = trio.CapacityLimiter(MEET_AT_ONCE)
        self._keys: dict[Endpoint, NodeKey] = {}
        self._introduced: set[NodeKey] = set()
        self.heard = trio.Event()
        """Replaced by another one whenever it is set: a peer said something new of itself."""

    @property
    def record(self) -> PeerRecord:
        return self._record

    def publish(self, **changes: object) -> None:
        """Change what this node says of itself; connected peers and the DHT hear it soon."""
        record = replace(self._record, **changes)  # type: ignore[arg-type]
        if record != self._record:
            self._record = replace(record, sequence=self._record.sequence + 1)
            self._changed.set()

    def snapshot(self) -> Snapshot:
        """The registry now, with the pipes' newest round trips."""
        for node, pipe in self._parts.gateway.pipes.items():
            if pipe.rtt is not None:
                self.registry.round_trip(node, pipe.rtt)
        return self.registry.snapshot(trio.current_time())

    def learn(self, endpoints: Sequence[Endpoint], source: Source) -> None:
        """Endpoints that may be peers of this model. Peers are DHT nodes too, on the same port.

        Host names are passed over: nobody but the operator makes us look one up (``addresses.resolve``).
        """
        for endpoint in endpoints:
            if is_address(endpoint.host) and self._discovery.add(endpoint, source):
                self.registry.heard_of(endpoint)
                if source is not Source.DHT:
                    self._parts.swarm.dht.add_node(endpoint)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """All known endpoints, best first."""
        return self._discovery.endpoints()

    def reachable(self) -> tuple[Endpoint, ...]:
        """Endpoints that answered, best first: worth remembering."""
        return self._discovery.answered()

    # -- pipes

    async def greet(self, pipe: Pipe) -> None:
        """A pipe is there: say who we are and whom we know."""
        self.registry.connected(pipe.peer, pipe.endpoint)
        self._discovery.met(pipe.endpoint, trio.current_time())
        await pipe.send(Record(self._record))
        if entries := self._gossip(pipe.peer):
            await pipe.send(Peers(entries))

    def _gossip(self, to: NodeKey) -> tuple[Contact, ...]:
        others = (other for other in self.snapshot().candidates if other.node != to and other.has_blocks)
        return tuple(map(contact_of, others))[:MAX_GOSSIP]

    def parted(self, node: NodeKey) -> None:
        """A pipe to ``node`` ended; a newer one may have taken its place."""
        newer = self._parts.gateway.pipes.get(node)
        if newer is not None and not newer.closed.is_set():
            return
        self._introduced.discard(node)
        self.registry.disconnected(node)

    def hear(self, sender: NodeKey, message: Message) -> None:
        """A Record or Peers message of ``sender``. A peer speaks for itself only."""
        match message:
            case Record(record) if record.model == self._record.model and record.node == sender:
                if self.registry.record(record):
                    self.heard.set()
                    self.heard = trio.Event()
            case Peers(entries):
                self.learn([entry.endpoint for entry in entries], Source.GOSSIP)
                self._keys |= {entry.endpoint: entry.node for entry in entries if is_address(entry.endpoint.host)}
                while len(self._keys) > MAX_KEYS:
                    del self._keys[next(iter(self._keys))]
            case _:
                pass

    # -- services

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_up)
            nursery.start_soon(self._spread_record)
            nursery.start_soon(self._introduce)
            while True:
                for endpoint in self._discovery.due(trio.current_time(), MEET_AT_ONCE):
                    nursery.start_soon(self._meet, endpoint)
                await trio.sleep(MEET_EVERY_S)

    async def _meet(self, endpoint: Endpoint) -> None:
        gateway = self._parts.gateway
        async with self._meeting:
            try:
                await gateway.pipe_to(endpoint, self._hashes[0])
            except (NetworkError, RemoteProtocolError):
                self._discovery.failed(endpoint, trio.current_time())
            else:
                self._discovery.met(endpoint, trio.current_time())
                return
        self.registry.retain(frozenset(self._discovery.endpoints()))
        if not gateway.is_own(endpoint):
            await self._follow(endpoint)

    async def _follow(self, endpoint: Endpoint) -> None:
        """A peer known by key that does not answer there may have come back on another port: its DHT record says."""
        node = self._keys.pop(endpoint, None)
        if node is None:
            return
        record = await self._parts.swarm.dht.get_record(node, self._record.model, DHT_LOOKUP_S)
        if record is not None and record.port not in (0, endpoint.port):
            self.learn([Endpoint(endpoint.host, record.port)], Source.GOSSIP)

    async def _look_up(self) -> None:
        dht = self._parts.swarm.dht
        for info_hash in self._hashes:
            dht.announce(info_hash, self._parts.gateway.endpoint.port)
        while True:
            self.learn(await dht.find_peers(self._hashes, DHT_LOOKUP_S), Source.DHT)
            await trio.sleep(DHT_LOOKUP_EVERY_S)

    async def _introduce(self) -> None:
        """Tell peers of one another when they begin to fetch: at their greeting they had nothing to be known for."""
        async with trio.open_nursery() as nursery:
            while True:
                heard = self.heard
                others = [peer for peer in self.snapshot().candidates if peer.has_blocks]
                new = [peer for peer in others if peer.node not in self._introduced]
                self._introduced |= {peer.node for peer in new}
                for peer in random.sample(others, min(len(others), INTRODUCE_TO)) if new else ():
                    entries = tuple(contact_of(other) for other in new if other is not peer)[:MAX_GOSSIP]
                    pipe = self._parts.gateway.pipes.get(peer.node)
                    if entries and pipe is not None:
                        nursery.start_soon(self._tell, pipe, Peers(entries))
                await trio.sleep(INTRODUCE_PAUSE_S)
                await heard.wait()

    async def _spread_record(self) -> None:
        async with trio.open_nursery() as nursery:
            await self._changed.wait()
            while True:
                with trio.move_on_after(PUT_EVERY_S) as unchanged:
                    await self._changed.wait()
                if unchanged.cancelled_caught:
                    nursery.start_soon(self._put_record, self._record)
                    continue
                await trio.sleep(RECORD_EVERY_S)
                self._changed = trio.Event()
                nursery.start_soon(self._put_record, self._record)
                for pipe in tuple(self._parts.gateway.pipes.values()):
                    nursery.start_soon(self._tell, pipe, Record(self._record))

    async def _tell(self, pipe: Pipe, message: Message) -> None:
        try:
            await pipe.send(message)
        except NetworkError:
            return  # it is gone; the next pipe to it begins with our record

    async def _put_record(self, record: PeerRecord) -> None:
        try:
            await self._parts.swarm.dht.put_record(record)
        except NetworkError:
            return  # a node without a DHT is found by its other endpoints
