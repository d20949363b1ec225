"""The DHT: who has a file (BEP 5), and what a node says of itself (BEP 44)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import libtorrent as lt
import trio

from torrentlm.errors import NetworkError, RemoteProtocolError
from torrentlm.records import Endpoint, InfoHash, NodeKey, PeerRecord
from torrentlm.swarm.addresses import is_address, resolve
from torrentlm.swarm.alerts import Alert, AlertPump, item_key, peers_key, put_key
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.item import decode_record, encode_record, salt_of

_ANNOUNCE_STEPS = (5.0, 20.0, 60.0, 300.0)
"""Seconds between the first announces: a young routing table knows few of the right nodes."""
_ANNOUNCE_INTERVAL = 900.0
"""Afterwards; DHT nodes forget an announce after 30 minutes."""
_ANNOUNCES_PER_SECOND = 50
_ENTER_INTERVAL = 0.5
_MAX_ENTER_INTERVAL = 4.0
_MAX_ENTRANCES = 200
_STATS_INTERVAL = 0.1
_PATIENT_INTERVAL = 1.0
"""Without a DHT to be in, a node may ask for as long as it runs."""
_STATS_TIMEOUT = 2.0
_MAX_PEERS = 500
"""Endpoints taken from one lookup: a hostile DHT node may answer with any number."""


@dataclass(slots=True)
class _Announce:
    port: int
    times: int = 0
    due: float = -math.inf


@dataclass(frozen=True, slots=True)
class DhtState:
    """``nodes`` in the routing table, ``lookups``: names of the lookups under way."""

    nodes: int
    lookups: tuple[str, ...]


class Dht:
    """This node's part of the DHT. Every wait has a limit; an empty answer is an answer."""

    def __init__(self, session: Any, pump: AlertPump, identity: Identity) -> None:
        self._session = session
        self._pump = pump
        self._identity = identity
        self._announces: dict[InfoHash, _Announce] = {}
        self._entrances: set[Endpoint] = set()
        self._wake = trio.Event()
        self._added = trio.Event()

    async def run(self, bootstrap: Sequence[Endpoint]) -> None:
        """The service task: enters the DHT, then announces what is due, paced."""
        for endpoint in await resolve(bootstrap):
            self.add_node(endpoint)
        while True:
            self._wake = trio.Event()
            await self._enter()
            await self._announce_due()
            next_due = min((announce.due for announce in self._announces.values()), default=math.inf)
            with trio.move_on_at(next_due):
                await self._wake.wait()

    def close(self) -> None:
        """Let go of the session, which can only end when nobody holds it."""
        self._session = None

    # -- the routing table

    def add_node(self, endpoint: Endpoint) -> None:
        """Make the DHT node at this address (UDP) known, if it is one; host names are passed over."""
        if is_address(endpoint.host) and (endpoint in self._entrances or len(self._entrances) < _MAX_ENTRANCES):
            self._entrances.add(endpoint)
            self._added.set()
            self._added = trio.Event()
            if self._session is not None:
                self._session.add_dht_node((endpoint.host, endpoint.port))

    async def state(self) -> DhtState:
        """What the DHT knows and does right now."""
        if self._session is None:  # the session closes first; whoever still asks is being cancelled
            await trio.lowlevel.checkpoint()
            return DhtState(0, ())
        with self._pump.collect("dht", _read_state) as states, trio.move_on_after(_STATS_TIMEOUT):
            self._session.post_dht_stats()
            return await states.receive()
        return DhtState(0, ())

    async def wait_nodes(self, within: float) -> bool:
        """Wait until the routing table is not empty; False after ``within`` seconds."""
        pause = _STATS_INTERVAL
        with trio.move_on_after(within):
            while not (await self.state()).nodes:  # libtorrent has no alert for it
                added = self._added
                with trio.move_on_after(pause):
                    await added.wait()
                pause = _STATS_INTERVAL if added.is_set() else min(2 * pause, _PATIENT_INTERVAL)
            return True
        return False

    # -- who has a file (BEP 5)

    def announce(self, info_hash: InfoHash, port: int) -> None:
        """Say now, and again at proper intervals, that TCP ``port`` here serves the torrent with this 20-byte hash."""
        self._announces[info_hash] = _Announce(port)
        self._wake.set()

    def withdraw(self, info_hash: InfoHash) -> None:
        """Announce it no longer; DHT nodes forget within 30 minutes what is not said again."""
        self._announces.pop(info_hash, None)

    async def get_peers(self, info_hash: InfoHash, within: float = 10.0) -> tuple[Endpoint, ...]:
        """Endpoints announced under the 20-byte hash: all that is found, or what is found ``within`` seconds.

        Waits for a first DHT node if there is none yet. Unverified: anybody can announce anything.
        """
        found: dict[Endpoint, None] = {}

        def on_reply(alert: Alert) -> None:
            for host, port in alert.peers():
                if port and len(found) < _MAX_PEERS:
                    found[Endpoint(host, port)] = None

        with trio.move_on_after(within), self._pump.handle(peers_key(info_hash), on_reply):
            await self.wait_nodes(math.inf)
            self._session.dht_get_peers(lt.sha1_hash(info_hash))
            await self._lookups_end("get_peers")
        return tuple(found)

    async def find_peers(self, info_hashes: Iterable[InfoHash], within: float = 10.0) -> tuple[Endpoint, ...]:
        """``get_peers`` under several hashes at once, merged."""
        found: dict[Endpoint, None] = {}

        async def look_up(info_hash: InfoHash) -> None:
            found.update(dict.fromkeys(await self.get_peers(info_hash, within)))

        async with trio.open_nursery() as nursery:
            for info_hash in info_hashes:
                nursery.start_soon(look_up, info_hash)
        return tuple(found)

    # -- what a node says of itself (BEP 44)

    async def put_record(self, record: PeerRecord, within: float = 30.0) -> int:
        """Store this node's record for ``record.model``; returns how many DHT nodes took it.

        Raises NetworkError if none did ``within`` seconds.
        """
        salt, value, node = salt_of(record.model), encode_record(record), self._identity.node
        puts = self._pump.collect(put_key(node, salt), lambda alert: int(alert.num_success))
        with trio.move_on_after(within), puts as stored:
            await self.wait_nodes(math.inf)
            while True:
                self._session.dht_put_mutable_item(self._identity.expanded_key, node, value, salt)
                if copies := await stored.receive():
                    return copies
                await trio.sleep(1)
        raise NetworkError(f"no DHT node stored this node's record within {within:.0f} s; check the bootstrap nodes")

    async def get_record(self, node: NodeKey, model: bytes, within: float = 10.0) -> PeerRecord | None:
        """The newest record that ``node`` stored for the model torrent with this v2 info-hash; None if there is none.

        libtorrent checked the signature; the content is bounded here, and what is malformed counts as none.
        """
        salt, best = salt_of(model), (-1, b"")
        with trio.move_on_after(within), self._pump.collect(item_key(node, salt), _read_item) as items:
            await self.wait_nodes(math.inf)
            self._session.dht_get_mutable_item(node, salt)
            async for sequence, value, last in items:
                best = max(best, (sequence, value))
                if last:
                    break
        try:
            return decode_record(node, model, best[1]) if best[1] else None
        except RemoteProtocolError:
            return None

    # -- inner workings

    async def _enter(self) -> None:
        """Wait for the first DHT node, asking again and again: libtorrent asks once, and datagrams get lost."""
        interval = _ENTER_INTERVAL
        while not await self.wait_nodes(interval):
            interval = min(2 * interval, _MAX_ENTER_INTERVAL)
            for endpoint in self._entrances:
                self._session.add_dht_node((endpoint.host, endpoint.port))

    async def _announce_due(self) -> None:
        for info_hash, announce in tuple(self._announces.items()):
            now = trio.current_time()
            if announce.due > now or self._announces.get(info_hash) is not announce:
                continue
            self._session.dht_announce(lt.sha1_hash(info_hash), announce.port, 0)
            announce.due = now + _until_next_announce(announce.times)
            announce.times += 1
            await trio.sleep(1 / _ANNOUNCES_PER_SECOND)

    async def _lookups_end(self, name: str) -> None:
        """Wait until no lookup of this kind is under way: libtorrent has no alert for it."""
        while True:
            await trio.sleep(_STATS_INTERVAL)
            if name not in (await self.state()).lookups:
                return


def _until_next_announce(times: int) -> float:
    if times < len(_ANNOUNCE_STEPS):
        return _ANNOUNCE_STEPS[times]
    return _ANNOUNCE_INTERVAL * random.uniform(0.8, 1.0)


def _read_state(alert: Alert) -> DhtState:
    nodes = sum(bucket["num_nodes"] for bucket in alert.routing_table)
    return DhtState(nodes, tuple(lookup["type"] for lookup in alert.active_requests))


def _read_item(alert: Alert) -> tuple[int, bytes, bool]:
    """Sequence, value, and whether it is the last word of this lookup."""
    value = alert.item.get("value") if isinstance(alert.item, dict) else alert.item
    return alert.seq, value if isinstance(value, bytes) else b"", alert.authoritative
