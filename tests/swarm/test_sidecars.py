"""Real nodes on loopback: a holder asks for the publisher's sidecar, and checks a block before it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.e2e import checkpoint
from tests.swarm.nodes import in_trio
from torrentlm.compute import overflow
from torrentlm.config import NodeConfig, Recipe
from torrentlm.errors import UnsupportedModelError
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.sidecar import MAX_BYTES, Libraries, Sidecar
from torrentlm.node import recheck, sidecars
from torrentlm.node.describe import describe_model
from torrentlm.node.membership import Membership
from torrentlm.node.node import Node, open_node
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.wire.messages import AskSidecar, SidecarBytes
from torrentlm.wire.tensors import Tensor

OTHER = Libraries("2.13.0", "5.0.0", "0.1.0", "some processor")
Event = dict[str, Any]


@asynccontextmanager
async def node(folder: Path, say: Callable[[Event], None] = lambda event: None, **how: Any) -> AsyncIterator[Node]:
    async with open_node(NodeConfig(data=folder, host="127.0.0.1", port=0, dht_bootstrap=(), **how), say) as opened:
        yield opened


@asynccontextmanager
async def publisher(folder: Path) -> AsyncIterator[tuple[Node, Membership, Magnet]]:
    """Publishes a tiny model and seeds it."""
    source = checkpoint.make(folder / "checkpoint")
    async with node(folder / "publisher") as opened:
        published = await trio.to_thread.run_sync(publish, Recipe("Tiny", source), opened.parts.store)
        membership = await opened.join(published.magnet, timeout=30)
        magnet = Magnet(published.magnet.v1, published.magnet.v2, "Tiny", peers=(opened.endpoint,))
        yield opened, membership, magnet


def break_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., None] = LlamaMLP.__init__

    def init(self: LlamaMLP, config: Any) -> None:
        original(self, config)
        self.act_fn = nn.GELU()

    monkeypatch.setattr(LlamaMLP, "__init__", init)


@in_trio(90)
async def test_a_holder_checks_a_block_against_the_publishers_sample(tmp_path: Path) -> None:
    said: list[Event] = []
    async with (
        publisher(tmp_path) as (_, _, magnet),
        node(tmp_path / "holder", said.append, blocks=Span(1, 2)) as holder,
    ):
        membership = await holder.join(magnet, timeout=30)
        await holder.hold(membership)
        assert {"event": "rechecked", "outcome": "same", "why": ""} in said
        assert membership.peers.record.resident == (Span(1, 2),)
        # It has the sidecar now, for whoever asks it.
        kept = await membership.sidecars.stored()
        assert kept is not None and not kept.own
        async with node(tmp_path / "client") as client:
            lonely = Magnet(magnet.v1, magnet.v2, "Tiny", peers=(holder.endpoint,))
            other = await client.join(lonely, timeout=30)
            found = await other.sidecars.find()
            assert found is not None and found.content == kept.content
            proof = describe_model(other, found)["proof"]
            assert proof["outcomes"][0]["exact"] and proof["source"] in (
                str(holder.endpoint),
                str(magnet.peers[0]),
            )


@in_trio(90)
async def test_another_library_version_is_caught_before_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Event] = []
    async with publisher(tmp_path) as (_, _, magnet):
        break_the_library(monkeypatch)
        monkeypatch.setattr(recheck, "libraries", lambda: OTHER)
        async with node(tmp_path / "holder", said.append, blocks=Span(1, 2)) as holder:
            membership = await holder.join(magnet, timeout=30)
            with pytest.raises(UnsupportedModelError, match=r"block [12] does not compute .* transformers 5\.0\.0\)"):
                await holder.hold(membership)
            assert membership.peers.record.resident == ()
        async with node(tmp_path / "stubborn", blocks=Span(1, 2), recheck=False) as holder:
            membership = await holder.join(magnet, timeout=30)
            await holder.hold(membership)
            assert membership.peers.record.resident == (Span(1, 2),)


@in_trio(90)
async def test_a_hostile_sidecar_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that names our own versions and sends nonsense as samples."""
    said: list[Event] = []
    async with publisher(tmp_path) as (_, membership, magnet):
        own = await membership.sidecars.stored()
        assert own is not None
        last = own.sidecar.samples[0].output.data  # what is written last
        assert own.content.endswith(last)
        flipped = bytes(byte ^ 0x55 for byte in own.content[-3 * len(last) :])
        hostile = own.content[: -3 * len(last)] + flipped
        Sidecar.from_bytes(hostile, membership.id)  # it reads
        membership._parts.store.save_sidecar(membership.id, hostile)
        async with node(tmp_path / "holder", said.append, blocks=Span(5, 5)) as holder:
            membership = await holder.join(magnet, timeout=30)
            await holder.hold(membership)
            [event] = [event for event in said if event["event"] == "rechecked"]
            assert event["outcome"] == "differs" and "served all the same" in event["why"]
            assert membership.peers.record.resident == (Span(5, 5),)
            assert await membership.sidecars.stored() is None


@in_trio(90)
async def test_answers_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonsense, too much, another model's, or nothing at all: asking ends, and the pipe lives."""
    monkeypatch.setattr(sidecars, "ASK_LIMIT_S", 2.0)
    async with publisher(tmp_path) as (seed, membership, magnet), node(tmp_path / "client") as client:
        joined = await client.join(magnet, timeout=30)
        assert len(await joined.sidecars.ask()) == 1
        answers: list[SidecarBytes | None] = [
            SidecarBytes(joined.id, Tensor("U8", (7,), b"garbage")),
            SidecarBytes(joined.id, Tensor("U8", (0,), b"")),
            SidecarBytes(joined.id, Tensor("U8", (MAX_BYTES + 1,), bytes(MAX_BYTES + 1))),
            SidecarBytes(bytes(32), Tensor("U8", (7,), b"garbage")),
            None,
        ]

        for answer in answers:

            def hear(sender: Any, message: Any, nursery: trio.Nursery, answer: Any = answer) -> None:
                if isinstance(message, AskSidecar) and answer is not None:
                    nursery.start_soon(seed.parts.gateway.pipes[sender].send, answer)

            monkeypatch.setattr(membership.sidecars, "hear", hear)
            assert await joined.sidecars.ask() == []
            assert seed.key in client.parts.gateway.pipes
        # What nobody asked for is passed over.
        await client.parts.gateway.pipes[seed.key].send(SidecarBytes(joined.id, Tensor("U8", (1,), b"x")))
        await seed.parts.gateway.pipes[client.key].send(SidecarBytes(joined.id, Tensor("U8", (1,), b"x")))
        monkeypatch.undo()
        await trio.sleep(0.5)  # else it would be taken for the answer
        assert len(await joined.sidecars.ask()) == 1


@in_trio(90)
async def test_a_peer_that_goes_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(tmp_path / "client") as client, publisher(tmp_path) as (seed, membership, magnet):
        joined = await client.join(magnet, timeout=30)
        monkeypatch.setattr(membership.sidecars, "hear", lambda *_: None)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                began = trio.current_time()
                assert await joined.sidecars.ask() == []
                assert trio.current_time() - began < sidecars.ASK_LIMIT_S / 2

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            await seed.parts.gateway.pipes[client.key].aclose()


@in_trio(60)
async def test_f16_that_a_block_exceeds_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []
    async with publisher(tmp_path) as (_, _, magnet):
        for folder, most in (("holder", overflow.F16_MAX), ("another", 2.0)):
            monkeypatch.setattr(overflow, "F16_MAX", most)
            async with node(tmp_path / folder, said.append, blocks=Span(1, 2), precision="F16") as holder:
                await holder.hold(await holder.join(magnet, timeout=30))
            warned = [event["why"] for event in said if event["event"] == "precision"]
            assert warned == (
                [] if folder == "holder" else ["F16 may not hold what blocks 1-2 compute; another --precision does"]
            )
