"""seed, generate, chat and inspect as README shows them: separate processes, a tiny model, a private DHT."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import checkpoint
from tests.e2e.processes import Seed, run
from torrentlm.cli.demo import find_recipe
from torrentlm.manifest.magnet import Magnet

BLOCKS = checkpoint.LAYERS + 2
PROMPT = "The swarm hums"


@dataclass
class World:
    """A published model, held by two peers, and the publisher gone."""

    folder: Path
    checkpoint: Path
    recipe: Path
    magnet: str
    holders: list[dict[str, Any]]

    def client(self, *arguments: str) -> tuple[str, ...]:
        return (*arguments, "--data", str(self.folder / "client"), "--dht-bootstrap", "none")


def write_recipe(path: Path, source: Path) -> Path:
    path.write_text(f'[model]\nname = "Tiny"\n\n[model.source]\nfolder = "{source}"\n')
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    source = checkpoint.make(folder / "checkpoint")
    recipe = write_recipe(folder / "model.toml", source)
    with ExitStack() as stack:
        publisher = stack.enter_context(Seed(str(recipe), folder / "publisher", "--blocks", "none"))
        published = publisher.wait_for("ready")
        assert published["blocks"] == [] and published["blocks_total"] == BLOCKS
        bootstrap = ("--dht-bootstrap", f"127.0.0.1:{published['port']}")
        seeds = [
            stack.enter_context(Seed(published["magnet"], folder / name, "--blocks", blocks, *bootstrap))
            for name, blocks in (("one", "0-2"), ("two", "3-5"))
        ]
        holders = [seed.wait_for("ready") for seed in seeds]
        assert publisher.end() == 0
        yield World(folder, source, recipe, holders[0]["magnet"], holders)
        for seed in seeds:
            assert seed.end(signal.SIGINT) == 130
            assert "Traceback" not in seed.errors


def test_holders_say_what_they_run(world: World):
    assert [holder["blocks"] for holder in world.holders] == [[0, 1, 2], [3, 4, 5]]
    assert world.holders[0]["name"] == "Tiny"
    assert Magnet.parse(world.magnet).peers[0].port == world.holders[0]["port"]


def test_generate_is_what_transformers_says(world: World):
    found = run(*world.client("generate", world.magnet, "--prompt", PROMPT, "--max-new-tokens", "24", "--json"))
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["tokens"] == checkpoint.greedy(world.checkpoint, PROMPT, 24)
    assert answer["tokens_per_second"] > 0 and answer["time_to_first_token_s"] > 0
    assert answer["finish"] == "length"
    ports = [holder["port"] for holder in world.holders]
    assert answer["route"] == [
        {"peer": f"127.0.0.1:{ports[0]}", "first": 0, "last": 2},
        {"peer": f"127.0.0.1:{ports[1]}", "first": 3, "last": 5},
    ]
    plain = run(*world.client("generate", world.magnet, "--prompt", PROMPT, "--max-new-tokens", "24"))
    assert plain.stdout == answer["text"] + "\n"


def test_the_second_holder_alone_leads_to_the_first(world: World):
    """A magnet without peers and one static peer are enough."""
    bare = str(Magnet(*_hashes(world.magnet), "Tiny"))
    peer = ("--peer", f"127.0.0.1:{world.holders[1]['port']}")
    found = run(*world.client("generate", bare, "--prompt", PROMPT, "--max-new-tokens", "2", *peer, "--json"))
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)["route"]) == 2


def _hashes(magnet: str) -> tuple[bytes | None, bytes | None]:
    parsed = Magnet.parse(magnet)
    return parsed.v1, parsed.v2


def test_chat_from_a_pipe_has_history(world: World):
    found = run(
        *world.client("chat", world.magnet, "--max-new-tokens", "8"),
        stdin="Hello\n/route\n/stats\nAgain\n/reset\nHello\n",
    )
    assert found.returncode == 0, found.stderr
    assert "blocks 0-2" in found.stdout and "blocks 3-5" in found.stdout
    assert "tokens/s" in found.stdout


SCRIPT = """
import sys, torrentlm
with torrentlm.connect(sys.argv[1], data=sys.argv[2], dht_bootstrap="none") as model, model.chat() as chat:
    for number in range(3):
        pieces = chat.send("Tell me more", max_new_tokens=200)
        print(number, repr(next(pieces)))
        pieces.close()
    print("whole", len("".join(chat.send("And now?", max_new_tokens=5))) > 0, len(chat.history))
    chat.reset()
    print("whole", len("".join(chat.send("And now?", max_new_tokens=5))) > 0, len(chat.history))
"""


def test_a_stopped_answer_spoils_nothing(world: World):
    """From Python, as README shows it: leave answers early, go on with the same conversation."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, world.magnet, str(world.folder / "script")],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "whole", "whole"]
    assert lines[-2:] == ["whole True 8", "whole True 2"]


def test_inspect_a_magnet(world: World):
    found = run(*world.client("inspect", world.magnet, "--json"))
    assert found.returncode == 0, found.stderr
    model = json.loads(found.stdout)
    assert model["name"] == "Tiny" and model["layers"] == checkpoint.LAYERS
    assert [block["kind"] for block in model["blocks"]] == ["stem", *["layers"] * checkpoint.LAYERS, "head"]
    assert all(block["tensors"] for block in model["blocks"])  # no file of them is the client's
    proof = model["proof"]  # the publisher is gone: a holder passes on what it found right
    assert [(row["dtype"], row["exact"]) for row in proof["outcomes"]] == [("F32", True)]
    assert proof["source"] in {f"127.0.0.1:{holder['port']}" for holder in world.holders}
    people = run(*world.client("inspect", world.magnet))
    assert people.returncode == 0 and "stem" in people.stdout and model["v2"] in people.stdout
    assert "exact in F32; 3 parts, real text" in people.stdout and proof["transformers"] in people.stdout


def test_inspect_a_block_torrent_of_a_holder(world: World):
    torrents = sorted((world.folder / "one" / "models").rglob("blocks/*.torrent"))
    held = [path for path in torrents if (world.folder / "one" / "blocks" / path.stem).exists()]
    found = run("inspect", str(held[0]), "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["tensors"]


def test_a_missing_block_is_named(world: World, tmp_path: Path):
    magnet = world.magnet
    with Seed(str(world.recipe), tmp_path / "half", "--blocks", "0-2") as half:
        ready = half.wait_for("ready")
        alone = str(Magnet(*_hashes(magnet), "Tiny"))
        peer = ("--peer", f"127.0.0.1:{ready['port']}")
        command = ("generate", alone, "--prompt", PROMPT, "--data", str(tmp_path / "client"), "--dht-bootstrap", "none")
        found = run(*command, *peer)
    assert found.returncode == 1
    assert "no peer holds block 3 (layer 2)" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_port_in_use(world: World, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        found = run("seed", str(world.recipe), "--data", str(tmp_path / "d"), "--host", "127.0.0.1", "--port", port)
    assert found.returncode == 1
    assert port in found.stderr and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr


def test_ctrl_c_while_it_starts(world: World, tmp_path: Path):
    """From the moment that it has its folder: before, some milliseconds belong to Python alone."""
    for wait in (0.0, 0.5, 1.5, 3.0):
        data = tmp_path / f"{wait}"
        with Seed(str(world.recipe), data) as seed:
            deadline = time.monotonic() + 60
            while not (data / "lock").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(wait)
            assert seed.end(signal.SIGINT) == 130
            assert "Traceback" not in seed.errors


def test_ctrl_c_breaks_publishing_off(tmp_path: Path):
    with Seed(str(find_recipe()), tmp_path / "p", "--blocks", "none") as seed:
        while not (event := seed.wait_for("progress"))["done"]:
            pass
        assert event["what"].startswith("publishing") and event["done"] < event["total"] / 2
        assert seed.end(signal.SIGINT) == 130
        assert "Traceback" not in seed.errors
    events = list(iter(seed.events.get, None))
    assert len(events) < 10
    assert "published" not in {event["event"] for event in events}
    assert not list((tmp_path / "p" / "models").iterdir())


def test_a_publisher_writes_nothing_beside_its_data(world: World, tmp_path: Path):
    before = set(world.checkpoint.rglob("*"))
    with Seed(str(world.recipe), tmp_path / "p", "--blocks", "none") as seed:
        magnet = seed.wait_for("ready")["magnet"]
    assert _hashes(magnet) == _hashes(world.magnet)
    assert set(world.checkpoint.rglob("*")) == before
