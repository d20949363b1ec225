"""What a person meets on the first day: each is one sentence, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import torrentlm
from tests.e2e import checkpoint
from tests.e2e.processes import Seed, run
from torrentlm.manifest.magnet import Magnet
from torrentlm.records import Endpoint

PROMPT = "The swarm hums"


@dataclass
class Published:
    """A tiny model's publisher, running, which serves nothing itself."""

    folder: Path
    checkpoint: Path
    magnet: str
    publisher: Seed


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("failures")
    source = checkpoint.make(folder / "checkpoint")
    recipe = folder / "model.toml"
    recipe.write_text(f'[model]\nname = "Tiny"\n\n[model.source]\nfolder = "{source}"\n')
    with Seed(str(recipe), folder / "publisher", "--blocks", "none") as publisher:
        yield Published(folder, source, publisher.wait_for("ready")["magnet"], publisher)


def one_sentence(found: subprocess.CompletedProcess[str]) -> str:
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1 and "Traceback" not in found.stderr
    return found.stderr


def connect(magnet: str, folder: Path) -> torrentlm.Model:
    return torrentlm.connect(magnet, data=folder, port=0, dht_bootstrap=["none"])


def test_a_holder_killed_in_mid_answer(published: Published, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Seed(published.magnet, tmp_path / "1", "--blocks", "0-2"))
        second = stack.enter_context(Seed(published.magnet, tmp_path / "2", "--blocks", "3-5"))
        first.wait_for("ready")
        magnet = second.wait_for("ready")["magnet"]
        with connect(magnet, tmp_path / "client") as model:
            pieces = model.generate(PROMPT, max_new_tokens=490, stream=True)
            next(iter(pieces))
            second.process.kill()
            with pytest.raises(torrentlm.HolderLostError, match=r"holder at 127\.0\.0\.1:\d+ \(blocks 3-5\)"):
                list(pieces)
            third = stack.enter_context(Seed(published.magnet, tmp_path / "3", "--blocks", "3-5"))
            third.wait_for("ready")
            model.generate(PROMPT, max_new_tokens=12)
            assert model.last is not None
            assert list(model.last.tokens) == checkpoint.greedy(published.checkpoint, PROMPT, 12)


def test_a_corrupt_block_file_is_found_and_fetched_again(published: Published, tmp_path: Path) -> None:
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5") as holder:
        holder.wait_for("ready")
        assert holder.end() == 0
    for number, path in enumerate(sorted((tmp_path / "holder" / "blocks").iterdir())):
        good, before = path.read_bytes(), path.stat()
        middle = len(good) // 2
        path.write_bytes(
            good[:middle] + bytes(byte ^ 0xFF for byte in good[middle : middle + 64]) + good[middle + 64 :]
        )
        if number % 2:  # as a bad disk does it
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5") as holder:
        magnet = holder.wait_for("ready")["magnet"]
        # What its stamps do not give away is found by hashing, which goes on while the holder serves.
        deadline = time.monotonic() + 60
        while not same_blocks(tmp_path / "holder", published.folder / "publisher"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with connect(magnet, tmp_path / "client") as model:
            model.generate(PROMPT, max_new_tokens=12)
            assert model.last is not None
            assert list(model.last.tokens) == checkpoint.greedy(published.checkpoint, PROMPT, 12)


def same_blocks(one: Path, other: Path) -> bool:
    return all(path.read_bytes() == (other / "blocks" / path.name).read_bytes() for path in (one / "blocks").iterdir())


def test_a_block_file_with_something_behind_its_end_is_mended(published: Published, tmp_path: Path) -> None:
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5") as holder:
        holder.wait_for("ready")
        assert holder.end() == 0
    for path in (tmp_path / "holder" / "blocks").iterdir():
        content = path.read_bytes()
        path.write_bytes(content + b"behind the end")
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5") as holder:
        holder.wait_for("ready")
    assert path.read_bytes() == content


def test_what_no_holder_would_take_does_not_end_a_session(published: Published, tmp_path: Path) -> None:
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5") as holder:
        magnet = holder.wait_for("ready")["magnet"]
        with connect(magnet, tmp_path / "client") as model:
            session = model.session(max_length=16)
            session.step([[5, 6]])
            for ids, how in (
                ([[10**6]], {}),
                ([[-1]], {}),
                ([[5], [6]], {}),
                ([[5]], {"position": 3}),
                ([[5]], {"reorder": [1]}),
            ):
                with pytest.raises(ValueError, match=r"id|row|position"):
                    session.step(ids, **how)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                session.step([[1.5]])  # type: ignore[list-item]
            assert session.step([[7]]).shape[1] == 1
            assert session.length == 3
            session.close()
            with pytest.raises(torrentlm.TorrentLMError, match="this session is closed"):
                session.step([[5]])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk(published: Published, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # Room for everything but the blocks, which take about 300 kB.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], check=True)
    try:
        with Seed(published.magnet, small / "data", "--blocks", "0-5") as holder:
            assert holder.process.wait(60) == 1
            log = tmp_path / "log"
            shutil.copy(small / "data.log", log)
        text = log.read_text()
        assert "disk full" in text and text.count("\n") == 1 and "Traceback" not in text
    finally:
        subprocess.run(["umount", str(small)], check=True)


def wrong_magnet(published: Published) -> str:
    port = Magnet.parse(published.magnet).peers[0]
    return f"magnet:?xt=urn:btih:{'ab' * 20}&xt=urn:btmh:1220{'cd' * 32}&dn=Wrong&x.pe={port}"


def test_a_wrong_magnet(published: Published, tmp_path: Path) -> None:
    command = (
        "generate",
        wrong_magnet(published),
        "--prompt",
        PROMPT,
        "--data",
        str(tmp_path),
        "--dht-bootstrap",
        "none",
    )
    assert "no peer sent this model's manifest" in one_sentence(run(*command))


def test_a_seed_says_that_it_waits(published: Published, tmp_path: Path) -> None:
    with Seed(wrong_magnet(published), tmp_path / "lost") as lost:
        assert "no peer has sent this model's manifest yet" in lost.wait_for("waiting")["why"]


def test_a_seed_says_what_nobody_has(published: Published, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with Seed(published.magnet, tmp_path / "data", "--blocks", "none") as holder:
        holder.wait_for("ready")
        assert holder.end() == 0
    alone = Magnet.parse(published.magnet)
    (tmp_path / "data" / "peers.json").unlink(missing_ok=True)
    with Seed(str(replace(alone, peers=())), tmp_path / "data", "--blocks", "1-2") as holder:
        assert "no peer has the files of blocks 1-2" in holder.wait_for("waiting")["why"]


def test_a_peer_by_name(published: Published, tmp_path: Path) -> None:
    magnet = Magnet.parse(published.magnet)
    named = Endpoint("localhost", magnet.peers[0].port)
    with Seed(str(replace(magnet, peers=(named,))), tmp_path / "named", "--blocks", "1") as holder:
        assert holder.wait_for("ready")["blocks"] == [1]
    with Seed(str(replace(magnet, peers=())), tmp_path / "static", "--blocks", "1", "--peer", str(named)) as holder:
        assert holder.wait_for("ready")["blocks"] == [1]


@pytest.mark.parametrize(
    "text", ["magnet:?dn=nothing", "magnet:?xt=urn:btih:zz", f"magnet:?xt=urn:btih:{'ab' * 20}", "magnet:?"]
)
def test_no_magnet_at_all(text: str, tmp_path: Path) -> None:
    assert "magnet" in one_sentence(run("generate", text, "--prompt", PROMPT, "--data", str(tmp_path)))


def test_two_nodes_do_not_share_a_data_folder(published: Published, tmp_path: Path) -> None:
    found = run("seed", published.magnet, "--data", str(published.folder / "publisher"), "--dht-bootstrap", "none")
    assert "in use by another node" in one_sentence(found)


def test_blocks_that_the_model_does_not_have(published: Published, tmp_path: Path) -> None:
    found = run(
        "seed", published.magnet, "--data", str(tmp_path), "--blocks", "3-9", "--port", "0", "--dht-bootstrap", "none"
    )
    assert "it has blocks 0-5" in one_sentence(found)


def test_a_budget_too_small_for_any_block(published: Published, tmp_path: Path) -> None:
    found = run(
        "seed", published.magnet, "--data", str(tmp_path), "--ram", "1000", "--port", "0", "--dht-bootstrap", "none"
    )
    assert "does not hold even one block" in one_sentence(found)


def test_budgets_that_the_named_blocks_do_not_fit(published: Published, tmp_path: Path) -> None:
    common = ("--data", str(tmp_path), "--blocks", "0-5", "--port", "0", "--dht-bootstrap", "none")
    said = one_sentence(run("seed", published.magnet, *common, "--ram", "200kB", "--precision", "F32"))
    assert "--blocks 0-5 needs 0.6 MB" in said and "ram = 0.2 MB" in said
    said = one_sentence(run("seed", published.magnet, *common, "--disk", "200kB"))
    assert "disk = 0.2 MB is too small" in said and "need 0.6 MB" in said


def test_a_disk_budget_limits_what_is_chosen(published: Published, tmp_path: Path) -> None:
    with Seed(published.magnet, tmp_path / "small", "--disk", "200kB") as holder:
        blocks = holder.wait_for("ready")["blocks"]
        assert 0 < len(blocks) < 6
        assert holder.end() == 0
    assert sum(path.stat().st_size for path in (tmp_path / "small" / "blocks").iterdir()) <= 200_000
    with Seed(published.magnet, tmp_path / "small", "--disk", "200kB") as holder:
        assert holder.wait_for("ready")["blocks"] == blocks


@pytest.fixture(scope="module")
def tuned(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Another model, which shares all but two layers with the first, and its publisher."""
    folder = tmp_path_factory.mktemp("tuned")
    source = checkpoint.fine_tune(published.checkpoint, folder / "checkpoint", (1, 2))
    recipe = folder / "model.toml"
    recipe.write_text(f'[model]\nname = "Tuned"\n\n[model.source]\nfolder = "{source}"\n')
    with Seed(str(recipe), folder / "publisher", "--blocks", "none") as publisher:
        yield Published(folder, source, publisher.wait_for("ready")["magnet"], publisher)


def block_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "blocks").iterdir()}


def test_one_model_makes_room_for_another_and_what_they_share_stays(
    published: Published, tuned: Published, tmp_path: Path
) -> None:
    first, second = block_files(published.folder / "publisher"), block_files(tuned.folder / "publisher")
    assert len(first.keys() & second.keys()) == len(first) - 2
    budget = sum(first.values()) + 10_000
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5", "--disk", str(budget)) as holder:
        holder.wait_for("ready")
        assert holder.end() == 0
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "holder" / "blocks").iterdir()}
    with Seed(tuned.magnet, tmp_path / "holder", "--blocks", "0-5", "--disk", str(budget)) as holder:
        magnet = holder.wait_for("ready")["magnet"]
        assert block_files(tmp_path / "holder") == second
        for path in (tmp_path / "holder" / "blocks").iterdir():
            assert path.name not in first or path.stat().st_mtime_ns == written[path.name]
        with connect(magnet, tmp_path / "client") as model:
            model.generate(PROMPT, max_new_tokens=12)
            assert model.last is not None
            assert list(model.last.tokens) == checkpoint.greedy(tuned.checkpoint, PROMPT, 12)


def test_what_was_published_here_stays(published: Published, tuned: Published, tmp_path: Path) -> None:
    shutil.copytree(published.folder / "publisher", tmp_path / "copy")
    before = block_files(tmp_path / "copy")
    budget = sum(before.values()) + 10_000
    common = ("--data", str(tmp_path / "copy"), "--blocks", "0-5", "--port", "0", "--dht-bootstrap", "none")
    said = one_sentence(run("seed", tuned.magnet, *common, "--disk", str(budget)))
    assert "is too small" in said and "must stay" in said
    assert block_files(tmp_path / "copy") == before
