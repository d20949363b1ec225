"""One node that holds two fine-tunes of one model: what they share is one file, one torrent, one copy in memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import trio

from tests.e2e import checkpoint
from tests.swarm.nodes import in_trio
from torrentlm.client.generation import Options
from torrentlm.config import Blocks, NodeConfig, Recipe, Settings
from torrentlm.node.client import open_client
from torrentlm.node.compare import compare
from torrentlm.node.node import Node, open_node
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Endpoint, Span
from torrentlm.swarm.store import Store

LAYERS = 6
CHANGED = (1, 2, 4)
PROMPT = "Once upon a time"


def config(data: Path, *peers: Endpoint, blocks: Blocks = "none") -> NodeConfig:
    return NodeConfig(data, "127.0.0.1", 0, peers, (), blocks, ram=1 << 30, threads=1)


def weights_of(node: Node, published: Published) -> dict[str, int]:
    """Where each parameter of the held model lies in memory."""
    assert node._computing is not None
    held = node._computing._served[published.model.v2].shares[0].model
    return {name: weight.data_ptr() for name, weight in held.runner(held.span)._model.named_parameters()}


async def hold(node: Node, published: Published) -> None:
    await node.hold(await node.join(published.magnet, timeout=30))


@in_trio(120)
async def test_two_fine_tunes_on_one_node(tmp_path: Path) -> None:
    base = checkpoint.make(tmp_path / "base", LAYERS)
    folders = (base, checkpoint.fine_tune(base, tmp_path / "tuned", CHANGED))
    with Store(tmp_path / "publisher") as store:
        models = [publish(Recipe(folder.name, folder), store) for folder in folders]
    names = {file.name for model in models for file in model.manifest.files}
    both = set(models[0].manifest.files) & set(models[1].manifest.files)
    blocks = Span(0, LAYERS + 1)
    async with open_node(config(tmp_path / "publisher")) as publisher:
        for model in models:
            await publisher.join(model.magnet, timeout=30)
        async with open_node(config(tmp_path / "holder", publisher.endpoint, blocks=blocks)) as holder:
            for model in models:
                await hold(holder, model)
            assert {path.name for path in (tmp_path / "holder" / "blocks").iterdir()} == names
            assert len(holder.parts.swarm.transfers) == len(names) + len(models)
            first, second = (weights_of(holder, model) for model in models)
            shared = [name for name in first if first[name] == second[name]]
            changed = tuple(f"model.layers.{layer}." for layer in CHANGED)
            assert shared == [name for name in first if not name.startswith(changed)]
            assert len(both) == len(names) - 2 * len(CHANGED)
            clients = [
                Settings(None, str(model.magnet), config(tmp_path / "client", holder.endpoint)) for model in models
            ]
            difference = await compare(*clients)
            assert (difference["same"], difference["different"]) == (LAYERS + 2 - len(CHANGED), len(CHANGED))
            for folder, settings in zip(folders, clients, strict=True):
                async with open_client(settings) as client:
                    result = await client.model.generate(PROMPT, Options(max_new_tokens=16))
                expected = await trio.to_thread.run_sync(checkpoint.greedy, folder, PROMPT, 16)
                assert list(result.tokens) == expected


@in_trio(120)
async def test_two_models_that_do_not_fit_together(tmp_path: Path) -> None:
    """Memory for one of them: each is loaded when a session asks for it, and the other one goes."""
    base = checkpoint.make(tmp_path / "base", LAYERS)
    folders = (base, checkpoint.fine_tune(base, tmp_path / "tuned", tuple(range(LAYERS))))
    with Store(tmp_path / "publisher") as store:
        models = [publish(Recipe(folder.name, folder), store) for folder in folders]
    size = sum(file.size for file in models[0].manifest.files)
    blocks = Span(0, LAYERS + 1)
    async with open_node(config(tmp_path / "publisher")) as publisher:
        for model in models:
            await publisher.join(model.magnet, timeout=30)
        settings = replace(config(tmp_path / "holder", publisher.endpoint, blocks=blocks), ram=int(size * 1.1 / 0.75))
        async with open_node(settings) as holder:
            for model in models:
                await hold(holder, model)
            assert holder._computing is not None
            memory = holder._computing.lanes[0].memory
            records = [holder.memberships[model.model.v2].peers.record for model in models]
            assert [record.offered for record in records] == [(blocks,), (blocks,)]
            resident = [sum(map(len, record.resident)) for record in records]
            assert len(blocks) > resident[0] > resident[1] > 0  # the first one found an empty memory
            for number in (1, 0, 1):
                client_config = config(tmp_path / "client", holder.endpoint)
                async with open_client(Settings(None, str(models[number].magnet), client_config)) as client:
                    result = await client.model.generate(PROMPT, Options(max_new_tokens=8))
                expected = await trio.to_thread.run_sync(checkpoint.greedy, folders[number], PROMPT, 8)
                assert list(result.tokens) == expected
                assert memory.used <= memory.budget < 2 * size
                assert holder.memberships[models[number].model.v2].peers.record.resident == (blocks,)


@in_trio(240)
async def test_a_damaged_file_that_is_loaded_is_mended_between_sessions(tmp_path: Path) -> None:
    base = checkpoint.make(tmp_path / "base", 2)
    with Store(tmp_path / "publisher") as store:
        model = publish(Recipe("base", base), store)
    async with open_node(config(tmp_path / "publisher")) as publisher:
        await publisher.join(model.magnet, timeout=30)
        async with open_node(config(tmp_path / "holder", publisher.endpoint, blocks=Span(0, 3))) as holder:
            await hold(holder, model)
            [membership] = holder.memberships.values()
            file = model.manifest.block_files(1)[0]
            path, good = (
                holder.parts.store.path(file.name),
                (tmp_path / "publisher" / "blocks" / file.name).read_bytes(),
            )
            before = path.stat()
            with path.open("r+b") as altered:
                altered.seek(file.size // 2)
                altered.write(bytes(64))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            settings = Settings(None, str(model.magnet), config(tmp_path / "client", holder.endpoint))
            async with open_client(settings) as client:
                await client.model.generate(PROMPT, Options(max_new_tokens=2))
                holder.check_disk()
                while any(1 in span for span in membership.peers.record.held):
                    await trio.sleep(0.02)
            while membership.peers.record.held != (Span(0, 3),) or membership.peers.record.resident:
                await trio.sleep(0.02)
            assert membership.peers.record.offered == (Span(0, 3),)
            assert path.read_bytes() == good
            async with open_client(settings) as client:
                result = await client.model.generate(PROMPT, Options(max_new_tokens=16))
            assert list(result.tokens) == await trio.to_thread.run_sync(checkpoint.greedy, base, PROMPT, 16)
