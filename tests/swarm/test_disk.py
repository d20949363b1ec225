"""Block files under a budget, on real nodes: what goes, who hears of it, a full disk, a damaged file, a killed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.swarm.nodes import in_trio, make_block, open_node
from tests.swarm.shelves import open_keeper
from torrentlm.errors import DiskFullError, StorageError
from torrentlm.manifest.torrent import Torrent
from torrentlm.node.fetch import BlockFiles
from torrentlm.node.scrub import check_slowly
from torrentlm.records import InfoHash, Span
from torrentlm.swarm.store import Store

SIZE = 200_000


def held(files: BlockFiles) -> tuple[list[int], tuple[Span, ...]]:
    """What is here, and what peers are told."""
    return files.held(), files._peers.held  # type: ignore[attr-defined]


def announced(files: BlockFiles, torrent: Torrent) -> bool:
    announces = files._parts.swarm.dht._announces
    found = {InfoHash(each) in announces for each in (torrent.v1, torrent.v2[:20])}
    assert len(found) == 1
    return found == {True}


@in_trio(90)
async def test_the_longest_unused_goes_and_nobody_is_told_of_it(tmp_path: Path) -> None:
    blocks = [make_block(tmp_path / "a", SIZE)[0] for _ in range(6)]
    async with open_node() as seed, open_keeper(tmp_path / "b", 4 * SIZE) as keeper:
        for torrent in blocks:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        one = keeper.model(blocks[:4], [seed.endpoint], 1)
        other = keeper.model(blocks[3:], [seed.endpoint], 2)
        for number in (2, 0, 1, 3):
            await one.fetch(one._manifest.span_files(number, number))
        assert held(one) == ([0, 1, 2, 3], (Span(0, 3),))
        assert held(other) == ([0], (Span(0, 0),))  # block 3 of the one: one copy
        one.keep(Span(0, 0))
        other.keep(Span(0, 2))
        await other.fetch(other._manifest.span_files(0, 2))
        # Of the unpinned, 2 and 1 had not been used for the longest time; the shared one is pinned by the other model.
        assert held(one) == ([0, 3], (Span(0, 0), Span(3, 3)))
        assert held(other) == ([0, 1, 2], (Span(0, 2),))
        for number in (1, 2):
            assert not keeper.store.path(blocks[number].name).exists()
            assert keeper.node.swarm.canonical(blocks[number].v1) is None
            assert not announced(one, blocks[number])
        for number in (0, 3, 4, 5):
            assert announced(one, blocks[number])
        with pytest.raises(StorageError, match=r"disk = 0\.8 MB is too small: .* raise --disk to 1\.0 MB"):
            await one.fetch(one._manifest.span_files(1, 1))
        # What one lets go stays for the other; then it may go, and what went comes again.
        other.release(Span(1, 2))
        await one.fetch(one._manifest.span_files(1, 2))
        assert held(one) == ([0, 1, 2, 3], (Span(0, 3),))
        assert held(other) == ([0], (Span(0, 0),))


@in_trio(60)
async def test_what_nobody_wants_any_more_is_not_fetched(tmp_path: Path) -> None:
    lonely, _ = make_block(tmp_path / "a", SIZE)
    async with open_keeper(tmp_path / "b", SIZE) as keeper:
        files = keeper.model([lonely])
        with trio.move_on_after(0.5):
            await files.fetch(files._manifest.files)
        assert keeper.node.swarm.transfers == ()
        assert not keeper.shelf.space.pinned(lonely.name)


@in_trio(60)
async def test_two_models_fetch_the_same_file_at_once(tmp_path: Path) -> None:
    shared, content = make_block(tmp_path / "a", 2_000_000)
    async with open_node() as seed, open_keeper(tmp_path / "b", 2_000_000) as keeper:
        seed.swarm.add_torrent(shared.to_bytes(), tmp_path / "a", verified=True)
        alone = keeper.model([shared], [], 1)
        other = keeper.model([shared], [seed.endpoint], 2)
        async with trio.open_nursery() as nursery:
            first = nursery.start_soon
            first(alone.fetch, alone._manifest.files)
            await trio.sleep(0.1)
            first(other.fetch, other._manifest.files)
        assert held(alone) == held(other) == ([0], (Span(0, 0),))
        assert keeper.store.path(shared.name).read_bytes() == content


@in_trio(60)
async def test_a_file_that_a_bad_disk_altered_is_withdrawn_and_fetched_again(tmp_path: Path) -> None:
    torrent, content = make_block(tmp_path / "a", SIZE)
    async with open_node() as seed, open_keeper(tmp_path / "b") as keeper:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        files = keeper.model([torrent], [seed.endpoint])
        await files.fetch(files._manifest.files)
        path = keeper.store.path(torrent.name)
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(SIZE // 2)
            file.write(bytes(100))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert keeper.store.holds(torrent.name)
        found = trio.Event()

        async def damaged(name: str) -> None:
            assert name == torrent.name
            keeper.shelf.damaged(name)
            assert held(files) == ([], ())
            assert not announced(files, torrent)
            await files.fetch(files._manifest.files)
            found.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_slowly, keeper.store, damaged)
            await found.wait()
            nursery.cancel_scope.cancel()
        assert path.read_bytes() == content
        assert held(files) == ([0], (Span(0, 0),))
        assert announced(files, torrent)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@in_trio(200)
async def test_a_full_disk_pauses_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    """Somebody else fills the disk while a file is coming: it waits, says so once, and goes on when there is room."""
    blocks = [make_block(tmp_path / "a", 1_000_000) for _ in range(2)]
    filling = small_disk / "somebody-else's"
    async with open_node() as seed, open_keeper(small_disk / "data", download_limit=400_000) as keeper:
        for torrent, _ in blocks:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        files = keeper.model([torrent for torrent, _ in blocks], [seed.endpoint])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.fetch, files._manifest.files)
            while not any(transfer.progress.done for transfer in keeper.node.swarm.transfers):
                await trio.sleep(0.05)
            filling.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
            while not any("disk full" in why for why in keeper.waiting):
                await trio.sleep(0.05)
            await trio.sleep(3)
            assert files.held() == []
            filling.unlink()
        assert [why for why in keeper.waiting if "disk full" in why] == [
            f"disk full: fetching into {keeper.store.blocks} pauses, and goes on by itself when there is room; "
            "free some space there"
        ]
        assert files.held() == [0, 1]
        for torrent, content in blocks:
            assert keeper.store.path(torrent.name).read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@in_trio(60)
async def test_a_disk_that_has_no_room_even_for_a_file(tmp_path: Path, small_disk: Path) -> None:
    """libtorrent stops fetching what it cannot write, and pauses it, too, if a read fails then, as happens at times."""
    torrent, content = make_block(tmp_path / "a", 300_000)
    filling = small_disk / "somebody-else's"
    async with open_node() as seed, open_node() as node:
        seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        (small_disk / "data").mkdir()
        with pytest.raises(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        transfer = node.swarm.add_torrent(torrent.to_bytes(), small_disk / "data")
        transfer.connect_peer(seed.endpoint)
        with pytest.raises(DiskFullError):
            await transfer.wait_complete()
        transfer.handle.pause()
        filling.unlink()
        transfer.resume()
        while not transfer.complete:
            transfer.connect_peer(seed.endpoint)
            await trio.sleep(0.2)
        assert (small_disk / "data" / torrent.name).read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@in_trio(200)
async def test_a_full_disk_evicts_what_it_may(tmp_path: Path, small_disk: Path) -> None:
    blocks = [make_block(tmp_path / "a", 1_000_000) for _ in range(2)]
    async with open_node() as seed, open_keeper(small_disk / "data", download_limit=400_000) as keeper:
        files = keeper.model([torrent for torrent, _ in blocks], [seed.endpoint])
        for torrent, _ in blocks:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
        await files.fetch(files._manifest.span_files(0, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.fetch, files._manifest.span_files(1, 1))
            while (running := keeper.shelf.transfers.get(blocks[1][0].name)) is None or not running.progress.done:
                await trio.sleep(0.05)
            (small_disk / "somebody-else's").write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))
        assert held(files) == ([1], (Span(1, 1),))
        assert keeper.store.path(blocks[1][0].name).read_bytes() == blocks[1][1]


KILLS = 10


@in_trio(240)
async def test_killed_while_fetching(tmp_path: Path) -> None:
    """Another process fetches and evicts over and over; after each kill its store is right, and goes on."""
    blocks = [make_block(tmp_path / "a", 300_000)[0] for _ in range(8)]
    chance = random.Random(1)
    times_held = times_partial = 0
    async with open_node() as seed:
        for torrent in blocks:
            seed.swarm.add_torrent(torrent.to_bytes(), tmp_path / "a", verified=True)
            (tmp_path / "a" / f"{torrent.name}.torrent").write_bytes(torrent.to_bytes())
        script = Path(__file__).with_name("crash_fetch.py")
        command = [sys.executable, str(script), str(tmp_path / "data"), str(tmp_path / "a"), str(seed.endpoint)]
        for kill in range(KILLS):
            process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
            assert process.stdout is not None
            said = b""
            while said.count(b"\n") < 1 + kill % 2:  # it has begun; every other time it has fetched something, too
                said += await process.stdout.receive_some(100)
            await trio.sleep(chance.uniform(0, 1))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            await process.wait()
            with Store(tmp_path / "data") as store:
                times_held += len(store.held())
                times_partial += len(list(store.blocks.iterdir())) - len(store.held())
                assert all(store.matches(name) for name in store.held())
    assert times_held >= KILLS // 2  # it was not killed too early to have anything
    assert times_partial > 0
