"""A node with several devices: parts of the processor, each with a budget, a holder and a hop of its own."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e import checkpoint
from tests.swarm.nodes import in_trio
from torrentlm.client.generation import Options
from torrentlm.client.session import RemoteSession, open_session
from torrentlm.compute.device import Device
from torrentlm.config import Blocks, NodeConfig, Recipe, Settings
from torrentlm.errors import ConfigError, RefusedError
from torrentlm.holder.execution import Execution, Result
from torrentlm.node.client import SwarmClient, open_client
from torrentlm.node.computing import Computing
from torrentlm.node.memory import WEIGHTS_SHARE, weights_bytes
from torrentlm.node.node import Node, open_node
from torrentlm.node.status import status_of
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Lane, SessionId, Span
from torrentlm.route.plan import Missing, plan_route
from torrentlm.structured import single_error
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Close, Fail, Message, NextHop, Open, Opened, Step

LAYERS = 6
ALL = Span(0, LAYERS + 1)
PROMPT = "Once upon a time"
TWO = ("cpu:0", "cpu:1")


def config(data: Path, *peers: Any, blocks: Blocks = "none", **more: Any) -> NodeConfig:
    return replace(NodeConfig(data, "127.0.0.1", 0, peers, (), blocks, ram=1 << 30, threads=1), **more)


@dataclass(frozen=True)
class Scene:
    """A published model, and a node with two devices that holds blocks of it."""

    folder: Path
    saved: Path
    published: Published
    holder: Node
    said: list[dict[str, Any]]

    @property
    def computing(self) -> Computing:
        assert self.holder.computing is not None
        return self.holder.computing

    @property
    def spans(self) -> list[Span]:
        return [share.model.span for share in self.computing._served[self.published.model.v2].shares]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[SwarmClient]:
        settings = Settings(None, str(self.published.magnet), config(self.folder / "client", self.holder.endpoint))
        async with open_client(settings) as client:
            yield client

    async def greedy(self, count: int) -> list[int]:
        return await trio.to_thread.run_sync(checkpoint.greedy, self.saved, PROMPT, count)


@asynccontextmanager
async def two_devices(
    folder: Path, blocks: Blocks = ALL, prepare: Callable[[Computing], None] = lambda computing: None, **more: Any
) -> AsyncIterator[Scene]:
    """``prepare`` has the devices before there are blocks on them."""
    saved = checkpoint.make(folder / "base", LAYERS)
    with Store(folder / "publisher") as store:
        published = publish(Recipe("base", saved), store)
    async with open_node(config(folder / "publisher")) as publisher:
        await publisher.join(published.magnet, timeout=30)
        given = config(folder / "holder", publisher.endpoint, blocks=blocks, **{"devices": TWO, **more})
        said: list[dict[str, Any]] = []
        async with open_node(given, said.append) as holder:
            prepare(await holder._compute())
            await holder.hold(await holder.join(published.magnet, timeout=30))
            yield Scene(folder, saved, published, holder, said)


class Line:
    """A bare client: one handle on the holder, and what it answers."""

    def __init__(self, scene: Scene, client: SwarmClient) -> None:
        self._model, self._links = scene.published.model.v2, client.node
        place = scene.holder.endpoint
        self.hop = NextHop(scene.holder.key, place.host, place.port, SessionId(b"h" * 16))
        inbox, self.answers = trio.open_memory_channel[Message](8)
        self._links.listen(self.hop.session, self.hop.node, inbox)

    async def tell(self, message: Message) -> None:
        await self._links.connect(self.hop)
        await self._links.send(self.hop.node, message, self.hop.session)

    async def open(self, span: Span) -> Message:
        prev = (self._links.key,)
        await self.tell(Open(self.hop.session, 0, self._model, span.first, span.last, prev, None, 1, 16, 30_000))
        return await self.answers.receive()


def refusal(message: Message) -> tuple[str, str]:
    assert isinstance(message, Fail)
    return message.code, message.message


def known_lanes(client: SwarmClient, holder: Node) -> tuple[Lane, ...]:
    """What the client has heard of the holder's devices."""
    return next(peer.lanes for peer in client.membership.snapshot().candidates if peer.node == holder.key)


@in_trio(120)
async def test_two_devices_of_one_node_are_two_hops_and_the_tokens_transformers_own(tmp_path: Path) -> None:
    async with two_devices(tmp_path) as scene:
        first, second = scene.spans
        assert (first.first, first.last + 1, second.last) == (0, second.first, ALL.last)
        record = scene.holder.memberships[scene.published.model.v2].peers.record
        assert (record.resident, record.offered) == ((ALL,), (ALL,))
        assert [lane.span for lane in record.lanes] == [first, second]
        async with scene.client() as client:
            result = await client.model.generate(PROMPT, Options(max_new_tokens=24))
            assert [(hop.first, hop.last) for hop in result.route] == [(s.first, s.last) for s in (first, second)]
            assert list(result.tokens) == await scene.greedy(24)


@in_trio(120)
async def test_each_device_keeps_to_its_own_budget(tmp_path: Path) -> None:
    async with two_devices(tmp_path) as scene:
        sizes = weights_bytes(scene.published.manifest, "F32")
        for lane, span in zip(scene.computing.lanes, scene.spans, strict=True):
            own = {file.name for file in scene.published.manifest.span_files(span.first, span.last)}
            assert {name for name, _ in lane.memory.keys} == own
            assert lane.memory.used == sum(sizes[name] for name in own)
            assert lane.device.budget == 1 << 29  # half of ram
        described = status_of(scene.holder)["devices"]
        assert [device["device"] for device in described] == list(TWO)
        assert [device["weights"]["used"] for device in described] == [
            lane.memory.used for lane in scene.computing.lanes
        ]


@in_trio(120)
async def test_an_automatic_span_is_what_the_devices_have_room_for_one_by_one(tmp_path: Path) -> None:
    saved = checkpoint.make(tmp_path / "sizes", LAYERS)
    with Store(tmp_path / "sizing") as store:
        manifest = publish(Recipe("base", saved), store).manifest
    sizes = weights_bytes(manifest, "F32")
    layer = sizes[manifest.block_files(1)[0].name]  # two of them and the stem, or almost three, on each device
    ram = int(2 * 2.9 * layer / WEIGHTS_SHARE)
    async with two_devices(tmp_path, "auto", ram=ram) as scene:
        for lane, span in zip(scene.computing.lanes, scene.spans, strict=True):
            needed = sum(sizes[file.name] for file in manifest.span_files(span.first, span.last))
            assert lane.memory.used == needed <= lane.memory.budget
        assert scene.spans == [Span(0, 2), Span(3, 4)]
        assert scene.computing.weights_budget > sum(sizes[file.name] for file in manifest.span_files(0, 5))
    with pytest.raises(ConfigError, match=r"--blocks 0-5 cannot be divided .* on cpu:0 and .* on cpu:1: raise --ram"):
        async with two_devices(tmp_path / "named", Span(0, 5), ram=ram):
            pass


@in_trio(120)
async def test_a_processor_beside_an_accelerator_gets_what_that_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "accelerates", property(lambda device: device.label == "cpu:1"))
    async with two_devices(tmp_path / "plenty") as scene:
        assert [len(lane.memory.keys) > 0 for lane in scene.computing.lanes] == [False, True]
        peers = scene.holder.memberships[scene.published.model.v2].peers
        assert (peers.record.resident, peers.record.lanes) == ((ALL,), ())

    sizes = weights_bytes(scene.published.manifest, "F32")
    due = [file.name for file in scene.published.manifest.span_files(4, ALL.last)]

    def shrink(computing: Computing) -> None:
        computing.lanes[1].memory.budget = sum(sizes[name] for name in due)

    async with two_devices(tmp_path / "little", prepare=shrink) as scene, scene.client() as client:
        assert scene.spans == [Span(0, 3), Span(4, ALL.last)]
        result = await client.model.generate(PROMPT, Options(max_new_tokens=8))
        assert len(result.route) == 2
        assert list(result.tokens) == await scene.greedy(8)


@in_trio(120)
async def test_sessions_on_two_devices_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device waits, in the middle of a step, for the first one to run another session's."""
    reached, passed = threading.Event(), threading.Event()
    run = Execution.run

    async with two_devices(tmp_path) as scene, scene.client() as client:
        first, second = scene.spans

        def meet(self: Execution, step: Step) -> Result:
            if self.span == first and reached.is_set():
                passed.set()
            if self.span == second and not reached.is_set():
                reached.set()
                assert passed.wait(30), "nothing ran on the first device while the second one was busy"
            return run(self, step)

        monkeypatch.setattr(Execution, "run", meet)
        results = []

        async def generate() -> None:
            results.append(list((await client.model.generate(PROMPT, Options(max_new_tokens=4))).tokens))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            await trio.to_thread.run_sync(reached.wait)
            nursery.start_soon(generate)
        assert passed.is_set()
        assert results == [await scene.greedy(4)] * 2


@in_trio(120)
async def test_a_handle_is_open_on_one_device_only_and_a_hop_is_within_one(tmp_path: Path) -> None:
    async with two_devices(tmp_path) as scene, scene.client() as client:
        first, second = scene.spans
        line = Line(scene, client)
        across = f"this holder has blocks {first} of that model, not {ALL}"
        assert refusal(await line.open(ALL)) == ("no_block", across)
        assert isinstance(await line.open(second), Opened)
        for span in (first, second):
            assert refusal(await line.open(span)) == ("bad_request", "this session is open already")
        assert [lane.holder.sessions for lane in scene.computing.lanes] == [0, 1]
        while [lane.sessions for lane in known_lanes(client, scene.holder)] != [0, 1]:
            await trio.sleep(0.02)
        await line.tell(Close(line.hop.session))
        while scene.computing.sessions:
            await trio.sleep(0.02)
        assert isinstance(await line.open(first), Opened)
        assert [lane.holder.sessions for lane in scene.computing.lanes] == [1, 0]


@asynccontextmanager
async def stepping(scene: Scene, client: SwarmClient) -> AsyncIterator[RemoteSession]:
    """A session through both devices."""
    route = plan_route(client.membership.snapshot(), ALL)
    assert not isinstance(route, Missing)
    model, labels = scene.published.model.v2, [str(hop.span) for hop in route]
    with single_error():
        async with trio.open_nursery() as nursery:
            options = {"max_length": 64, "vocabulary": 256}
            session = await open_session(client.node, nursery, model, route, labels, **options)
            try:
                yield session
            finally:
                await session.close()
                nursery.cancel_scope.cancel()


@in_trio(120)
async def test_every_device_hears_that_a_session_is_alive(tmp_path: Path) -> None:
    async with two_devices(tmp_path, lease=1.0) as scene, scene.client() as client, stepping(scene, client) as session:
        sessions = [live.session for lane in scene.computing.lanes for live in lane.holder._live.values()]
        opened = [one.expires for one in sessions]
        assert len(opened) == 2
        while any(now.expires < then + 1 for now, then in zip(sessions, opened, strict=True)):
            await trio.sleep(0.02)
        assert (await session.step([[1, 2, 3]])).shape == (1, 3, 256)


@in_trio(120)
async def test_what_fails_on_the_next_device_reaches_the_client(tmp_path: Path) -> None:
    async with two_devices(tmp_path) as scene, scene.client() as client, stepping(scene, client) as session:
        holder = scene.computing.lanes[1].holder
        for live in list(holder._live.values()):
            holder._end(live)
        with pytest.raises(RefusedError, match=f"{scene.spans[0]}: this session is not open here"):
            await session.step([[1, 2, 3]])


@in_trio(120)
async def test_a_device_that_vanishes_takes_its_own_blocks_and_sessions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Execution.run

    def lost() -> None:
        raise ConfigError("The device cpu:1 is not usable any more.")

    async with two_devices(tmp_path) as scene, scene.client() as client:
        first, second = scene.spans

        def broken(self: Execution, step: Step) -> Result:
            if self.span == second:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return run(self, step)

        line = Line(scene, client)
        assert isinstance(await line.open(first), Opened)
        monkeypatch.setattr(Execution, "run", broken)
        with pytest.raises(RefusedError, match="its log says why"):  # a bug, as long as the device is there
            await client.model.generate(PROMPT, Options(max_new_tokens=2))
        peers = scene.holder.memberships[scene.published.model.v2].peers
        assert peers.record.resident == (ALL,)

        monkeypatch.setattr(scene.computing.lanes[1].device, "check", lost)
        with pytest.raises(RefusedError):
            await client.model.generate(PROMPT, Options(max_new_tokens=2))
        while peers.record.offered != (first,):
            await trio.sleep(0.02)
        assert (peers.record.resident, peers.record.claimed) == ((first,), ())
        why = "The device cpu:1 is not usable any more."
        assert {"event": "device", "device": "cpu:1", "why": why} in scene.said
        assert [device["lost"] for device in status_of(scene.holder)["devices"]] == ["", why]
        while scene.computing.lanes[0].holder.sessions != 1:  # all but the one that uses no other device
            await trio.sleep(0.02)
        await line.tell(Close(line.hop.session))
        assert refusal(await line.open(second)) == ("no_block", why)
        assert isinstance(await line.open(first), Opened)
