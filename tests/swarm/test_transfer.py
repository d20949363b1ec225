"""Torrents between real nodes: gateway and libtorrent together, on loopback."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest
import trio

from tests.swarm.nodes import in_trio, make_block, make_model, open_node
from torrentlm.errors import ArtifactError, NetworkError, StorageError
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.torrent import Torrent
from torrentlm.swarm.store import Store
from torrentlm.wire.alias import misnomer


@in_trio(30)
async def test_magnet_to_metadata_to_content(tmp_path: Path) -> None:
    torrent, contents = make_model(tmp_path / "a")
    async with open_node() as publisher, open_node() as joiner:
        publisher.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a")
        transfer = joiner.swarm.add_torrent(Magnet(torrent.v1, torrent.v2, "a model"), tmp_path / "b")
        assert (transfer.name, transfer.complete) == ("a model", False)
        transfer.connect_peer(publisher.endpoint)
        metadata = Torrent.from_bytes(await transfer.wait_metadata(10))
        assert (metadata.v1, metadata.v2, transfer.name) == (torrent.v1, torrent.v2, "model")
        await transfer.wait_complete(10)
        assert transfer.complete
        assert transfer.progress.done == transfer.progress.total == sum(map(len, contents.values()))
    for path, content in contents.items():
        assert (tmp_path / "b" / "model" / path).read_bytes() == content


@pytest.mark.parametrize("known", ["v1", "v2"])
@in_trio(30)
async def test_half_a_magnet_is_enough(tmp_path: Path, known: str) -> None:
    torrent, _ = make_model(tmp_path / "a")
    magnet = Magnet(torrent.v1, None) if known == "v1" else Magnet(None, torrent.v2)
    async with open_node() as publisher, open_node() as joiner:
        publisher.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a")
        transfer = joiner.swarm.add_torrent(magnet, tmp_path / "b")
        transfer.connect_peer(publisher.endpoint)
        await transfer.wait_complete(10)
        assert (transfer.v1, transfer.v2) == (torrent.v1, torrent.v2)
        for info_hash in (torrent.v1, torrent.v2[:20]):
            assert joiner.swarm.canonical(info_hash) == torrent.v1
        assert joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b") is transfer


@in_trio(30)
async def test_all_names_of_a_torrent_are_answered_to(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    wrong = misnomer(torrent.info)
    async with open_node() as node:
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        assert transfer.info_hashes == (torrent.v1, torrent.v2[:20])
        assert transfer.names == (torrent.v1, torrent.v2[:20], wrong)
        assert {node.swarm.canonical(name) for name in transfer.names} == {torrent.v1}
        assert node.swarm.canonical(os.urandom(20)) is None
        node.swarm.remove(transfer)
        assert {node.swarm.canonical(name) for name in (torrent.v1, torrent.v2[:20], wrong)} == {None}


@in_trio(60)
async def test_many_blocks_at_once_from_two_peers(tmp_path: Path) -> None:
    blocks = [make_block(tmp_path / "a", 1_000_000) for _ in range(12)]
    async with open_node() as first, open_node() as second, open_node() as joiner:
        for torrent, _ in blocks:
            first.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
            second.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfers = [joiner.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b") for torrent, _ in blocks]
        for transfer in transfers:
            transfer.connect_peer(first.endpoint)
            transfer.connect_peer(second.endpoint)
        for transfer in transfers:
            await transfer.wait_complete(20)
    for torrent, content in blocks:
        assert (tmp_path / "b" / torrent.name).read_bytes() == content


@in_trio(60)
async def test_changed_file_is_noticed_and_fetched_again(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a")
    with Store(tmp_path / "b") as store:
        async with open_node() as seed:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
            async with open_node() as node:
                transfer = node.swarm.add_torrent(torrent.to_bytes(), store.blocks)
                transfer.connect_peer(seed.endpoint)
                await transfer.wait_complete(10)
                store.mark_verified(torrent.name)
                port = node.endpoint.port
            with store.path(torrent.name).open("r+b") as file:
                file.seek(1_500_000)
                file.write(bytes(100))
            assert not store.holds(torrent.name)
            async with open_node(port=port) as node:
                transfer = node.swarm.add_torrent(torrent.to_bytes(), store.blocks, verified=False)
                with trio.move_on_after(1):
                    await transfer.wait_complete(10)
                assert not transfer.complete
                assert 0 < transfer.progress.done < len(content)
                transfer.connect_peer(seed.endpoint)
                await transfer.wait_complete(20)
        assert store.path(torrent.name).read_bytes() == content


@in_trio(60)
async def test_recheck_repairs_what_kept_its_stamp(tmp_path: Path) -> None:
    """Several times over: the seed takes this node for another seed by then, and has to let it in all the same."""
    torrent, content = make_block(tmp_path / "a")
    copy = tmp_path / "b" / torrent.name
    async with open_node() as seed, open_node() as node:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        for _ in range(4):
            transfer.connect_peer(seed.endpoint)
            await transfer.wait_complete(15)
            assert copy.read_bytes() == content
            with copy.open("r+b") as file:
                file.seek(2_000_000)
                file.write(bytes(10))
            await transfer.recheck()
            assert not transfer.complete


@in_trio(30)
async def test_verified_content_is_seeded_without_a_check(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a", 50_000_000)
    async with open_node() as node:
        began = time.perf_counter()
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        await transfer.wait_complete(10)
        unchecked = time.perf_counter() - began
        began = time.perf_counter()
        await transfer.recheck()
        await transfer.wait_complete(10)
        assert unchecked < (time.perf_counter() - began) / 2


@in_trio(30)
async def test_nobody_there_is_one_sentence(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    async with open_node() as node:
        transfer = node.swarm.add_torrent(Magnet(torrent.v1, torrent.v2, "lonely"), tmp_path / "b")
        with pytest.raises(NetworkError, match=r"^no peer sent the metadata of lonely within 0 s; check the magnet"):
            await transfer.wait_metadata(0.3)
        whole = node.swarm.add_torrent(make_block(tmp_path / "a")[0].to_bytes(), tmp_path / "b")
        with pytest.raises(NetworkError, match=r"^no peer has sent anything of .* for 1 s \(0 connected\)"):
            await whole.wait_complete(stall_timeout=1)


@in_trio(30)
async def test_damaged_torrents_are_refused(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    good = torrent.to_bytes()
    async with open_node() as node:
        for bad in (b"", b"de", b"hello", good[: len(good) // 2], good.replace(b"4:name", b"4:nome"), os.urandom(1000)):
            with pytest.raises(ArtifactError, match="not a torrent file"):
                node.swarm.add_torrent(bad, tmp_path / "b")


@in_trio(30)
async def test_removed_transfer_wakes_who_waits(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    async with open_node() as node, trio.open_nursery() as nursery:
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")

        async def wait() -> None:
            with pytest.raises(NetworkError, match="was removed"):
                await transfer.wait_complete()

        nursery.start_soon(wait)
        await trio.sleep(0.1)
        node.swarm.remove(transfer)
        assert node.swarm.transfers == ()
        assert node.swarm.canonical(torrent.v1) is None
        transfer.connect_peer(node.endpoint)


@in_trio(30)
async def test_ordinary_client_downloads_and_seeds(tmp_path: Path, plain_session: Callable[..., Any]) -> None:
    """A libtorrent client with default plugins and encryption: first as a downloader, then as the only seed."""
    torrent, content = make_block(tmp_path / "a")
    client = plain_session(enable_outgoing_utp=True, min_reconnect_time=1)
    async with open_node() as node:
        node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        handle = add_plain(client, torrent, tmp_path / "c")
        handle.connect_peer(("127.0.0.1", node.endpoint.port))
        while not handle.status().is_seeding:
            await trio.sleep(0.05)
        assert (tmp_path / "c" / torrent.name).read_bytes() == content
    async with open_node() as node:
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "d")
        transfer.connect_peer(type(node.endpoint)("127.0.0.1", client.listen_port()))
        await transfer.wait_complete(15)
        assert (tmp_path / "d" / torrent.name).read_bytes() == content


@in_trio(30)
async def test_progress_survives_a_restart(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a", 20_000_000)
    half = tmp_path / "b" / torrent.name
    half.parent.mkdir()
    half.write_bytes(content[:10_000_000])
    async with open_node() as seed, open_node() as node:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = node.swarm.add_torrent(torrent.to_bytes(), half.parent)
        transfer.connect_peer(seed.endpoint)
        await transfer.wait_complete(15)
        assert half.read_bytes() == content
        assert transfer.handle.status().total_payload_download < 11_000_000


def add_plain(session: Any, torrent: Torrent, folder: Path) -> Any:
    params = lt.load_torrent_buffer(torrent.to_bytes())
    params.save_path = str(folder)
    params.flags = 0
    return session.add_torrent(params)


@in_trio(30)
async def test_file_that_does_not_fit_is_one_sentence_and_a_later_session_goes_on(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a")
    async with open_node() as seed:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            async with open_node() as node:
                transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
                transfer.connect_peer(seed.endpoint)
                with pytest.raises(StorageError, match=rf"{torrent.name} is larger than a file may be there"):
                    await transfer.wait_complete(10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        async with open_node() as node:
            transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
            transfer.connect_peer(seed.endpoint)
            await transfer.wait_complete(10)
        assert (tmp_path / "b" / torrent.name).read_bytes() == content


@in_trio(30)
async def test_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    (tmp_path / "b").write_text("a file, no folder")
    async with open_node() as seed, open_node() as node:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        transfer.connect_peer(seed.endpoint)
        with pytest.raises(StorageError, match="not a directory"):
            await transfer.wait_complete(10)


@in_trio(30)
async def test_file_removed_while_seeding_is_an_error(tmp_path: Path) -> None:
    torrent, _ = make_block(tmp_path / "a")
    async with open_node() as seed, open_node() as node:
        seeded = seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        await seeded.wait_complete(10)
        (tmp_path / "a" / torrent.name).unlink()
        transfer = node.swarm.add_torrent(torrent.to_bytes(), tmp_path / "b")
        transfer.connect_peer(seed.endpoint)
        while seeded.error is None:
            await trio.sleep(0.05)
        assert isinstance(seeded.error, StorageError)
        assert not seeded.complete
        assert str(seeded.error).startswith(f"{tmp_path / 'a' / torrent.name} is gone")
