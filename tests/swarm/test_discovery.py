"""One way of finding the swarm at a time: each by itself brings a new holder in, and a client to all blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import torrentlm
from tests.e2e import checkpoint
from tests.e2e.processes import Seed
from torrentlm.manifest.magnet import Magnet
from torrentlm.records import Endpoint

PROMPT = "The swarm hums"
WITHIN = 90


@dataclass
class Entry:
    """A node that has everything on disk and runs half of the blocks."""

    checkpoint: Path
    magnet: Magnet
    endpoint: str


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entry]:
    folder = tmp_path_factory.mktemp("discovery")
    source = checkpoint.make(folder / "checkpoint")
    recipe = folder / "model.toml"
    recipe.write_text(f'[model]\nname = "Tiny"\n\n[model.source]\nfolder = "{source}"\n')
    with Seed(str(recipe), folder / "entry", "--blocks", "0-2") as seed:
        ready = seed.wait_for("ready")
        yield Entry(source, Magnet.parse(ready["magnet"]), f"127.0.0.1:{ready['port']}")


def bare(entry: Entry) -> str:
    return str(replace(entry.magnet, peers=()))


def check(entry: Entry, magnet: str, folder: Path, *options: str, **how: list[str]) -> None:
    """A holder with an empty folder, and then a client, come in with ``magnet`` and these options."""
    with ExitStack() as stack:
        holder = stack.enter_context(Seed(magnet, folder / "holder", "--blocks", "3-5", *options))
        holder.wait_for("ready", WITHIN)
        model = stack.enter_context(
            torrentlm.connect(magnet, data=folder / "client", port=0, **{"dht_bootstrap": ["none"], **how})  # type: ignore[arg-type]
        )
        model.generate(PROMPT, max_new_tokens=8)
        assert model.last is not None
        assert list(model.last.tokens) == checkpoint.greedy(entry.checkpoint, PROMPT, 8)
        assert [(hop.first, hop.last) for hop in model.last.route] == [(0, 2), (3, 5)]


def test_by_the_magnets_own_peer(entry: Entry, tmp_path: Path) -> None:
    assert entry.magnet.peers == (Endpoint.parse(entry.endpoint),)
    check(entry, str(entry.magnet), tmp_path)


def test_by_a_static_peer(entry: Entry, tmp_path: Path) -> None:
    check(entry, bare(entry), tmp_path, "--peer", entry.endpoint, peers=[entry.endpoint])


def test_by_the_dht(entry: Entry, tmp_path: Path) -> None:
    check(entry, bare(entry), tmp_path, "--dht-bootstrap", entry.endpoint, dht_bootstrap=[entry.endpoint])


def test_by_the_last_sessions_peers(entry: Entry, tmp_path: Path) -> None:
    with Seed(str(entry.magnet), tmp_path / "holder", "--blocks", "none") as holder:
        holder.wait_for("ready", WITHIN)
        assert holder.end() == 0
    with torrentlm.connect(str(entry.magnet), data=tmp_path / "client", port=0, dht_bootstrap=["none"]) as model:
        model.inspect()
    check(entry, bare(entry), tmp_path)
