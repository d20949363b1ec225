"""What a node takes from others about peers, and tells them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from torrentlm.errors import NetworkError
from torrentlm.node import peers
from torrentlm.node.parts import Parts
from torrentlm.node.peers import ModelPeers
from torrentlm.records import Endpoint, InfoHash, NodeKey, PeerRecord, Span
from torrentlm.swarm.discovery import FORGET_AFTER_FAILURES, Source
from torrentlm.wire.messages import Contact, Peers, Record

OWN, HOLDER, CLIENT = NodeKey(b"o" * 32), NodeKey(b"h" * 32), NodeKey(b"c" * 32)
MODEL = b"m" * 32
HERE, THERE = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 2)


class _Dht:
    def __init__(self) -> None:
        self.puts: list[float] = []

    def add_node(self, endpoint: Endpoint) -> None:
        assert endpoint.host.startswith("10.")

    async def put_record(self, record: PeerRecord) -> None:
        self.puts.append(trio.current_time())

    def announce(self, info_hash: InfoHash, port: int) -> None:
        pass

    async def find_peers(self, hashes: object, within: float) -> tuple[Endpoint, ...]:
        return ()


class _Pipe:
    def __init__(self, peer: NodeKey, endpoint: Endpoint) -> None:
        self.peer, self.endpoint, self.rtt = peer, endpoint, None
        self.closed = trio.Event()
        self.sent: list[Any] = []

    async def send(self, message: object) -> None:
        self.sent.append(message)


class _Gateway:
    endpoint = Endpoint("10.0.0.9", 9)

    def __init__(self) -> None:
        self.pipes: dict[NodeKey, _Pipe] = {}

    def is_own(self, endpoint: Endpoint) -> bool:
        return endpoint == self.endpoint

    async def pipe_to(self, endpoint: Endpoint, info_hash: InfoHash) -> None:
        raise NetworkError("nobody there")


def make() -> tuple[ModelPeers, _Gateway, _Dht]:
    gateway, dht = _Gateway(), _Dht()
    parts = cast(Parts, SimpleNamespace(key=OWN, gateway=gateway, swarm=SimpleNamespace(dht=dht)))
    return ModelPeers(parts, [InfoHash(b"1" * 20)], PeerRecord(OWN, MODEL, 9)), gateway, dht


async def greeted(model: ModelPeers, node: NodeKey, endpoint: Endpoint, **record: Any) -> _Pipe:
    pipe = _Pipe(node, endpoint)
    await model.greet(cast(Any, pipe))
    model.hear(node, Record(PeerRecord(node, MODEL, endpoint.port, **record)))
    return pipe


def test_host_names_that_others_tell_are_not_looked_up() -> None:
    async def main() -> None:
        model, *_ = make()
        model.hear(HOLDER, Peers((Contact(CLIENT, "printer.office", 1), Contact(CLIENT, "10.0.0.1", 1))))
        model.learn([Endpoint("elsewhere.example", 1)], Source.DHT)
        assert model.endpoints() == (HERE,)

    trio.run(main)


def test_peers_without_blocks_are_not_passed_on() -> None:
    async def main() -> None:
        model, *_ = make()
        await greeted(model, HOLDER, HERE, claimed=(Span(0, 1),))
        await greeted(model, CLIENT, THERE)
        third = await greeted(model, NodeKey(b"t" * 32), Endpoint("10.0.0.3", 3))
        assert third.sent[1] == Peers((Contact(HOLDER, HERE.host, HERE.port),))

    trio.run(main)


def test_a_pipe_that_was_replaced_does_not_part_its_peer() -> None:
    async def main() -> None:
        model, gateway, _ = make()
        gateway.pipes[HOLDER] = await greeted(model, HOLDER, HERE, held=(Span(0, 1),))
        model.parted(HOLDER)
        assert model.snapshot().answered == 1
        gateway.pipes[HOLDER].closed.set()
        model.parted(HOLDER)
        assert model.snapshot().answered == 0

    trio.run(main)


def test_the_silent_are_forgotten_with_their_endpoint() -> None:
    async def main() -> None:
        model, *_ = make()
        model.learn([HERE], Source.GOSSIP)
        model.learn([THERE], Source.STATIC)
        with trio.move_on_after(2**FORGET_AFTER_FAILURES):
            await model.run()
        assert model.endpoints() == (THERE,)
        assert model.snapshot().known == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_record_is_put_again_before_the_dht_forgets_it() -> None:
    async def main() -> None:
        model, _, dht = make()
        with trio.move_on_after(2 * peers.PUT_EVERY_S):
            await model.run()
        assert dht.puts == []
        model.publish(held=(Span(0, 1),))
        with trio.move_on_after(2.5 * peers.PUT_EVERY_S):
            await model.run()
        assert [round(later - sooner) for sooner, later in pairwise(dht.puts)] == [peers.PUT_EVERY_S] * 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_begins_to_fetch_is_told_to_those_that_are_here() -> None:
    """At its greeting it had nothing to be known for; those that are known for blocks hear of it, once."""

    async def main() -> None:
        model, gateway, _ = make()
        third = NodeKey(b"t" * 32)
        places = {HOLDER: HERE, CLIENT: THERE, third: Endpoint("10.0.0.3", 3)}
        for node, endpoint in places.items():
            gateway.pipes[node] = await greeted(model, node, endpoint)
        for pipe in gateway.pipes.values():
            pipe.sent.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model._introduce)
            for node in (HOLDER, CLIENT):
                model.hear(node, Record(PeerRecord(node, MODEL, places[node].port, sequence=1, fetching=(Span(0, 1),))))
                await trio.sleep(2 * peers.INTRODUCE_PAUSE_S)
            model.hear(CLIENT, Record(PeerRecord(CLIENT, MODEL, THERE.port, sequence=2, held=(Span(0, 1),))))
            await trio.sleep(2 * peers.INTRODUCE_PAUSE_S)
            nursery.cancel_scope.cancel()
        assert gateway.pipes[HOLDER].sent == [Peers((Contact(CLIENT, THERE.host, THERE.port),))]
        assert gateway.pipes[CLIENT].sent == []  # who was told of it dials it
        assert gateway.pipes[third].sent == []  # it neither has nor wants any

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
