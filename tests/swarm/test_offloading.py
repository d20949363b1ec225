"""A node whose accelerator has too little memory (a part of the processor stands in for one), and RAM beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.swarm.nodes import in_trio
from tests.swarm.test_devices import ALL, PROMPT, Scene, known_lanes, two_devices
from torrentlm.client.generation import Options
from torrentlm.compute.device import Device
from torrentlm.errors import ConfigError, RefusedError
from torrentlm.node import node
from torrentlm.node.computing import Computing
from torrentlm.node.memory import offloadable, weights_bytes
from torrentlm.node.status import status_of
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.route.assign import SLABS
from torrentlm.route.plan import UNMEASURED_BLOCK_S, Missing, plan_route

ONE = ("cpu:0",)
LAYER = 123_392
"""Bytes of a layer of the model in F32."""
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def _accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "accelerates", property(lambda device: True))
    monkeypatch.setattr(node, "may_accelerate", lambda: True)


def budgets(layers: float, ram: int, upload: float = 0.0) -> Callable[[Computing], None]:
    """Room on each device for the embeddings and so many layers, and so much RAM beside."""

    def prepare(computing: Computing) -> None:
        for lane in computing.lanes:
            lane.memory.budget = int(layers * LAYER) + 64 * 256 * 4 + 2_000
            lane.aside.budget = ram
            lane.device.upload = upload

    return prepare


def sizes(published: Published) -> tuple[dict[str, int], dict[int, int]]:
    """Of files on the device, and of blocks in RAM."""
    in_memory = weights_bytes(published.manifest, "F32")
    return in_memory, offloadable(published.manifest, in_memory, ALL)


def offloaded(scene: Scene) -> list[tuple[int, ...]]:
    return [share.model.offloading.blocks for share in scene.computing._served[scene.published.model.v2].shares]


@in_trio(120)
async def test_blocks_in_ram_say_the_same_tokens(tmp_path: Path) -> None:
    async with two_devices(tmp_path, prepare=budgets(4.2, PLENTY), devices=ONE) as scene, scene.client() as client:
        assert offloaded(scene) == [(3, 4, 5, 6)]
        in_memory, may = sizes(scene.published)
        assert in_memory[scene.published.manifest.block_files(1)[0].name] == LAYER
        [lane] = scene.computing.lanes
        aside = {scene.published.manifest.block_files(block)[0].name for block in (3, 4, 5, 6)}
        assert lane.memory.used == sum(in_memory.values()) - 4 * LAYER + SLABS * may[3] <= lane.memory.budget
        assert {name for name, _ in lane.aside.keys} == aside and lane.aside.used == 4 * may[3]
        assert all(scene.computing.holds(name) for name in in_memory)
        record = scene.holder.memberships[scene.published.model.v2].peers.record
        assert (record.resident, record.offered) == ((ALL,), (ALL,))

        due = await scene.greedy(24)
        result = await client.model.generate(PROMPT, Options(max_new_tokens=24))
        assert len(result.route) == 1  # one device is one hop
        assert list(result.tokens) == due
        found: list[list[int]] = []

        async def again() -> None:
            found.append(list((await client.model.generate(PROMPT, Options(max_new_tokens=24))).tokens))

        async with trio.open_nursery() as nursery:  # sessions that take turns
            nursery.start_soon(again)
            nursery.start_soon(again)
        assert found == [due, due]

        while lane.aside.pinned:  # closing a session is a message
            await trio.sleep(0.01)
        [described] = status_of(scene.holder)["devices"]
        assert described["offloaded"] == {"budget": PLENTY, "used": lane.aside.used, "pinned": 0}


@in_trio(120)
async def test_two_devices_offload_each_its_own(tmp_path: Path) -> None:
    prepare = budgets(2.5, int(3.3 * LAYER))
    async with two_devices(tmp_path, prepare=prepare) as scene, scene.client() as client:
        first, second = scene.spans
        aside = offloaded(scene)
        assert all(aside) and set(aside[0]) <= set(first) and set(aside[1]) <= set(second)
        lanes = known_lanes(client, scene.holder)
        assert {block for lane in lanes for block in lane.span} == set(ALL)
        assert {lane.number for lane in lanes if set(lane.span) <= set(first)} == {0}
        assert {lane.number for lane in lanes if set(lane.span) <= set(second)} == {1}
        result = await client.model.generate(PROMPT, Options(max_new_tokens=12))
        assert [(hop.first, hop.last) for hop in result.route] == [(s.first, s.last) for s in (first, second)]
        assert list(result.tokens) == await scene.greedy(12)
        for lane in scene.computing.lanes:
            assert lane.memory.used <= lane.memory.budget and lane.aside.used <= lane.aside.budget


@in_trio(120)
async def test_peers_are_told_how_long_an_offloaded_block_takes(tmp_path: Path) -> None:
    slow = budgets(4.2, PLENTY, upload=LAYER / 0.050)  # 50 ms for each
    async with two_devices(tmp_path, prepare=slow, devices=ONE) as scene, scene.client() as client:
        resident, aside, head = known_lanes(client, scene.holder)
        assert (resident.span, aside.span, head.span) == (Span(0, 2), Span(3, 6), Span(7, 7))
        assert (resident.block_ms, head.block_ms) == (0, 0) and aside.block_ms == pytest.approx(50, rel=0.05)
        assert {lane.number for lane in (resident, aside, head)} == {0}

        snapshot = client.membership.snapshot()
        [own] = [peer for peer in snapshot.candidates if peer.node == scene.holder.key]
        other = replace(own, node=bytes(32), resident=(Span(3, 6),), lanes=(), rtt_s=0.020)
        route = plan_route(replace(snapshot, candidates=(own, other)), ALL)
        assert not isinstance(route, Missing)
        assert [(hop.node == own.node, str(hop.span)) for hop in route] == [(True, "0-2"), (False, "3-6"), (True, "7")]
        far = plan_route(replace(snapshot, candidates=(own, replace(other, rtt_s=0.600))), ALL)
        assert not isinstance(far, Missing) and [hop.node for hop in far] == [own.node]


@in_trio(120)
async def test_a_fast_copy_is_hidden_behind_what_computes(tmp_path: Path) -> None:
    fast = budgets(4.2, PLENTY, upload=1e12)
    async with two_devices(tmp_path, prepare=fast, devices=ONE) as scene, scene.client() as client:
        lanes = known_lanes(client, scene.holder)
        assert [lane.block_ms for lane in lanes] == [0, 1000 * UNMEASURED_BLOCK_S, 0]


@in_trio(120)
async def test_an_automatic_span_goes_on_in_ram_beyond_what_fits(tmp_path: Path) -> None:
    async with two_devices(tmp_path / "off", "auto", prepare=budgets(3.2, 0), devices=ONE) as scene:
        assert (scene.spans, offloaded(scene)) == ([Span(0, 3)], [()])
        assert not scene.holder.memberships[scene.published.model.v2].peers.record.lanes
    async with two_devices(tmp_path / "on", "auto", prepare=budgets(3.2, int(4.5 * LAYER)), devices=ONE) as scene:
        assert (scene.spans, offloaded(scene)) == ([Span(0, 5)], [(2, 3, 4, 5)])
        lane = scene.computing.lanes[0]
        assert lane.memory.used <= lane.memory.budget and lane.aside.used <= lane.aside.budget


@in_trio(120)
async def test_a_named_span_that_does_not_fit_even_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--blocks 0-7 cannot be divided .* of RAM to offload to: raise --vram"):
        async with two_devices(tmp_path, prepare=budgets(2.5, 3 * LAYER), devices=ONE):
            pass


@in_trio(120)
async def test_what_a_session_uses_is_pinned_in_both_memories(tmp_path: Path) -> None:
    async with two_devices(tmp_path, prepare=budgets(4.2, PLENTY), devices=ONE) as scene, scene.client() as client:
        [lane] = scene.computing.lanes
        async with client.model.session(max_length=16) as session:
            del session
            assert lane.aside.pinned == lane.aside.used > 0 and lane.memory.pinned == lane.memory.used
            assert not scene.computing.relieve()
        while lane.aside.pinned:
            await trio.sleep(0.01)
        assert scene.computing.relieve() and not lane.aside.used
        assert not scene.holder.memberships[scene.published.model.v2].peers.record.resident
        result = await client.model.generate(PROMPT, Options(max_new_tokens=8))  # they are loaded again
        assert list(result.tokens) == await scene.greedy(8)


@in_trio(120)
async def test_no_room_in_ram_is_a_refusal(tmp_path: Path) -> None:
    async with two_devices(tmp_path, prepare=budgets(4.2, PLENTY), devices=ONE) as scene, scene.client() as client:
        [lane] = scene.computing.lanes
        assert scene.computing.relieve()
        lane.aside.budget = LAYER
        with pytest.raises(RefusedError, match=r"this holder has 0.1 MB for weights"):
            await client.model.generate(PROMPT, Options(max_new_tokens=8))
        assert not lane.memory.pinned
