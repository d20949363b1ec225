"""Adapters that sessions bring to a node: bounded, shared, and gone when others need the room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.e2e import checkpoint
from tests.peft_adapters import load, make_adapter, merged
from tests.swarm.nodes import in_trio
from torrentlm.client.generation import Options
from torrentlm.config import AdapterRecipe, NodeConfig, Recipe, Settings
from torrentlm.errors import ArtifactError, NetworkError, RefusedError
from torrentlm.holder.adapters import Borrowed
from torrentlm.manifest.magnet import Magnet
from torrentlm.node import adapters as node_adapters
from torrentlm.node.client import open_client
from torrentlm.node.node import Node, open_node
from torrentlm.publish.adapter import PublishedAdapter, publish_adapter
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import AdapterId, Endpoint, Span
from torrentlm.swarm.store import Store

NAMES = ("pirate", "poet", "clerk")
ALL = Span(0, checkpoint.LAYERS + 1)


@dataclass(frozen=True)
class Shelf:
    """A model and adapters for it, in one data folder."""

    data: Path
    model: Published
    adapters: dict[str, PublishedAdapter]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    base = checkpoint.make(folder / "base")
    with Store(folder / "data") as store:
        model = publish(Recipe("base", base), store)
        adapters = {
            name: publish_adapter(
                AdapterRecipe(name, make_adapter(base, folder / name, seed)), model.magnet, model.manifest, store
            )
            for seed, name in enumerate(NAMES)
        }
    return Shelf(folder / "data", model, adapters)


def config(data: Path, *peers: Endpoint, adapters: int = 0) -> NodeConfig:
    return NodeConfig(data, "127.0.0.1", 0, peers, (), ALL, ram=1 << 30, threads=1, adapters=adapters)


@asynccontextmanager
async def two_nodes(
    shelf: Shelf, tmp_path: Path, adapters: int, shared: tuple[str, ...] = NAMES
) -> AsyncIterator[Node]:
    """A publisher that holds nothing, and the node under test, which knows it."""
    async with open_node(config(shelf.data)) as publisher:
        await publisher.join(shelf.model.magnet, timeout=30)
        for name in shared:
            publisher.adapters.share(shelf.adapters[name])
        async with open_node(config(tmp_path / "holder", publisher.endpoint, adapters=adapters)) as holder:
            await holder.join(shelf.model.magnet, timeout=30)
            yield holder


def id_of(adapter: PublishedAdapter) -> AdapterId:
    return AdapterId(adapter.torrent.v1, adapter.torrent.v2)


async def borrow(node: Node, shelf: Shelf, name: str, span: Span = ALL) -> Borrowed:
    return await node.adapters.borrow(shelf.model.model.v2, id_of(shelf.adapters[name]), span)


def on_disk(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "holder" / "adapters" / "blocks").iterdir()}


def files_of(shelf: Shelf, name: str) -> set[str]:
    return {file.name for file in shelf.adapters[name].manifest.files}


@in_trio(120)
async def test_the_longest_unused_makes_room_and_what_is_out_stays(shelf: Shelf, tmp_path: Path) -> None:
    one = max(adapter.manifest.size + adapter.torrent.size for adapter in shelf.adapters.values())
    async with two_nodes(shelf, tmp_path, adapters=2 * one) as node:
        pirate = await borrow(node, shelf, "pirate")
        assert {path.name for path, _ in pirate.files} == files_of(shelf, "pirate") == on_disk(tmp_path)
        assert len(pirate.scalings) == 3 * checkpoint.LAYERS
        (await borrow(node, shelf, "poet")).give_back()
        assert one < node.adapters.kept <= 2 * one
        clerk = await borrow(node, shelf, "clerk")  # the poet goes
        assert on_disk(tmp_path) == files_of(shelf, "pirate") | files_of(shelf, "clerk")
        with pytest.raises(RefusedError, match="do not fit") as error:
            await borrow(node, shelf, "poet")
        assert error.value.code == "memory"
        pirate.give_back()
        clerk.give_back()
        again = await borrow(node, shelf, "clerk")  # is here still
        poet = await borrow(node, shelf, "poet")
        assert on_disk(tmp_path) == files_of(shelf, "poet") | files_of(shelf, "clerk")
        for path, _ in (*again.files, *poet.files):
            assert path.read_bytes() == (shelf.data / "blocks" / path.name).read_bytes()
        hashes = {transfer.v2 for transfer in node.parts.swarm.transfers}
        assert not hashes & {file.v2 for file in shelf.adapters["pirate"].manifest.files}
    async with open_node(config(tmp_path / "holder")):
        assert not (tmp_path / "holder" / "adapters").exists()  # a cache starts out empty


@in_trio(60)
async def test_a_span_fetches_its_own_part_alone(shelf: Shelf, tmp_path: Path) -> None:
    async with two_nodes(shelf, tmp_path, adapters=1 << 20) as node:
        part = await borrow(node, shelf, "pirate", Span(2, 3))
        assert {path.name for path, _ in part.files} == on_disk(tmp_path)
        assert {name.split(".")[2] for name in part.scalings} == {"1", "2"}
        nothing = await borrow(node, shelf, "pirate", Span(0, 0))
        assert (nothing.files, nothing.scalings) == ((), {})
        everything = await borrow(node, shelf, "pirate")
        assert on_disk(tmp_path) == files_of(shelf, "pirate")
        for each in (part, nothing, everything):
            each.give_back()


@in_trio(60)
async def test_what_is_no_adapter_of_the_model_is_refused_and_forgotten(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_adapters, "FETCH_LIMIT_S", 4.0)
    model = shelf.model.model
    async with two_nodes(shelf, tmp_path, adapters=1 << 20, shared=("pirate",)) as node:
        before = len(node.parts.swarm.transfers)

        async def refused(adapter: AdapterId, says: str, by: bytes = model.v2) -> None:
            with pytest.raises(RefusedError, match=says):
                await node.adapters.borrow(by, adapter, ALL)
            assert len(node.parts.swarm.transfers) == before
            assert not node.adapters._entries

        await refused(AdapterId(model.v1, model.v2), "not one of a torrentlm adapter")
        block = shelf.model.manifest.files[0]
        await refused(AdapterId(block.v1, block.v2), "did not come|not one of a torrentlm adapter")
        await refused(id_of(shelf.adapters["poet"]), "did not come within")
        pirate = id_of(shelf.adapters["pirate"])
        await refused(replace(pirate, v1=b"x" * 20), "did not come|different torrents|two hashes")
        await refused(pirate, "holds no block", by=b"m" * 32)
        with monkeypatch.context() as patch:
            patch.setattr(node_adapters, "MAX_TORRENT_CONTENT", 1000)
            await refused(pirate, "not fetched")
        (await borrow(node, shelf, "pirate")).give_back()


@in_trio(60)
async def test_an_adapter_of_another_model_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    other = publish_other(shelf, tmp_path)
    async with two_nodes(shelf, tmp_path, adapters=1 << 20) as node:
        membership = node.memberships[shelf.model.model.v2]
        node.memberships[other] = membership
        membership.id = other
        with pytest.raises(RefusedError, match="made for another model") as error:
            await node.adapters.borrow(other, id_of(shelf.adapters["pirate"]), ALL)
        assert error.value.code == "no_adapter"
        with pytest.raises(ArtifactError, match="made for another model"):
            await node.adapters.manifest(membership, id_of(shelf.adapters["pirate"]))


def publish_other(shelf: Shelf, tmp_path: Path) -> bytes:
    """The same weights under another name are another model."""
    with Store(tmp_path / "other") as store:
        return publish(Recipe("other", shelf.data.parent / "base"), store).model.v2


@in_trio(60)
async def test_torrents_that_are_not_what_the_manifest_says_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    """A publisher who lies about a block's size would have the holder fetch more than its budget."""
    async with two_nodes(shelf, tmp_path, adapters=1 << 20, shared=()) as node:
        adapter = shelf.adapters["pirate"]
        entry = node_adapters._Entry(id_of(adapter), folder=adapter.folder, manifest=adapter.manifest)
        file = adapter.manifest.files[0]
        node.adapters._read_torrent(entry, file)
        for lie in (replace(file, size=file.size - 1), replace(file, v1=b"x" * 20), replace(file, v2=b"x" * 32)):
            with pytest.raises(ArtifactError, match="published wrongly"):
                node.adapters._read_torrent(entry, lie)


@in_trio(120)
async def test_sessions_of_two_adapters_share_the_base_in_memory(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner_weights(node: Node) -> dict[str, int]:
        assert node._computing is not None
        held = node._computing._served[shelf.model.model.v2].shares[0].model
        assert len(held._runners) == 1
        return {name: weight.data_ptr() for name, weight in held.runner(ALL)._model.named_parameters()}

    async with two_nodes(shelf, tmp_path, adapters=1 << 20) as node:
        membership = node.memberships[shelf.model.model.v2]
        await node.hold(membership)
        assert membership.peers.record.adapters == 1 << 20
        before = runner_weights(node)
        settings = Settings(None, str(shelf.model.magnet), config(tmp_path / "client", node.endpoint))
        async with open_client(settings) as client:
            texts = []
            async with client.model.session(max_length=64, adapter=str(shelf.adapters["pirate"].magnet)):
                for name in NAMES[:2]:
                    magnet = str(shelf.adapters[name].magnet)
                    result = await client.model.generate("Hello", Options(max_new_tokens=8), adapter=magnet)
                    texts.append(result.tokens)
                    assert runner_weights(node) == before
                assert node.sessions >= 1  # that of the block around
            assert texts[0] != texts[1]
            monkeypatch.setattr(node_adapters, "FETCH_LIMIT_S", 2.0)
            with pytest.raises(NetworkError, match="did not come"):
                await client.model.generate("Hello", Options(), adapter=str(Magnet(b"u" * 20, b"v" * 32)))


def save_t5(folder: Path) -> None:
    """A random encoder-decoder with the tokenizer of the other checkpoint."""
    checkpoint.make(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)


@in_trio(120)
async def test_an_encoder_decoder_has_its_adapter_on_both_sides(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_t5(base)
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q", "v", "wi", "wo"], size=0.4)
    with Store(tmp_path / "data") as store:
        model = publish(Recipe("base", base), store)
        adapter = publish_adapter(AdapterRecipe("a", folder), model.magnet, model.manifest, store)
    assert adapter.manifest.touched == {1, 2, 5, 6}
    every = Span(0, len(model.manifest.blocks) - 1)
    async with open_node(replace(config(tmp_path / "data", adapters=1 << 20), blocks=every)) as node:
        membership = await node.join(model.magnet, timeout=30)
        node.adapters.share(adapter)
        await node.hold(membership)
        settings = Settings(None, str(model.magnet), config(tmp_path / "client", node.endpoint))
        async with open_client(settings) as client:
            results = [
                await client.model.generate("Hello", Options(max_new_tokens=12), adapter=link)
                for link in (str(adapter.magnet), None)
            ]
    ids = torch.tensor([client.model.tokenizer("Hello")["input_ids"]])
    for result, whole in zip(results, (merged(base, folder), load(base)), strict=True):
        expected = whole.generate(ids, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        assert list(result.tokens) == expected
    assert results[0].tokens != results[1].tokens
