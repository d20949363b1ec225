"""A node's shelf on real gateways and libtorrent sessions, and models on it without anything that computes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

from tests.swarm.nodes import BareNode, open_node
from torrentlm.manifest.manifest import FileEntry
from torrentlm.manifest.torrent import Torrent
from torrentlm.node.fetch import BlockFiles
from torrentlm.node.shelf import Shelf
from torrentlm.records import Endpoint, Span
from torrentlm.swarm.space import Space
from torrentlm.swarm.store import Store


class Files:
    """As much of a manifest as says which files a model has: one a block."""

    def __init__(self, torrents: Sequence[Torrent]) -> None:
        self.files = [FileEntry(each.name, each.size, each.v1, each.v2 or b"", 0) for each in torrents]
        self.blocks = self.files

    def block_files(self, block: int) -> list[FileEntry]:
        return [self.files[block]]

    def span_files(self, first: int, last: int) -> list[FileEntry]:
        return self.files[first : last + 1]


class Others:
    """Peers that have everything, and what this node said of itself."""

    def __init__(self, model: bytes, endpoints: Sequence[Endpoint]) -> None:
        self.record = SimpleNamespace(model=model)
        self.held: tuple[Span, ...] = ()
        self.fetching: list[tuple[Span, ...]] = []
        self.heard = trio.Event()
        every = (Span(0, 999),)
        candidates = [SimpleNamespace(endpoint=endpoint, held=every, fetching=()) for endpoint in endpoints]
        self._snapshot = SimpleNamespace(candidates=candidates, answered=len(candidates), known=len(candidates))

    def snapshot(self) -> Any:
        return self._snapshot

    def publish(self, *, held: tuple[Span, ...], fetching: tuple[Span, ...]) -> None:
        self.held = held
        self.fetching.append(fetching)


class Keeper:
    """One node with a disk."""

    def __init__(self, node: BareNode, store: Store, budget: int | None) -> None:
        self.node, self.store = node, store
        self.said: list[dict[str, Any]] = []
        self.shelf = Shelf(
            store,
            Space(store, budget),
            node.swarm,
            node.gateway,
            lambda why: self.said.append({"event": "waiting", "why": why}),
        )

    def model(self, torrents: Sequence[Torrent], endpoints: Sequence[Endpoint] = (), number: int = 1) -> BlockFiles:
        """A model of these files, held by the nodes at ``endpoints``."""
        folder = self.store.model_folder(bytes([number]) * 32) / "model"
        (folder / "blocks").mkdir(parents=True, exist_ok=True)
        for torrent in torrents:
            (folder / "blocks" / f"{torrent.name}.torrent").write_bytes(torrent.to_bytes())
        parts: Any = SimpleNamespace(
            store=self.store,
            shelf=self.shelf,
            swarm=self.node.swarm,
            gateway=self.node.gateway,
            say=self.said.append,
        )
        peers: Any = Others(bytes([number]) * 32, endpoints)
        manifest: Any = Files(torrents)
        files = BlockFiles(parts, peers, manifest, folder)
        files.seed_what_is_here()
        return files

    @property
    def waiting(self) -> list[str]:
        return [event["why"] for event in self.said if event["event"] == "waiting"]


@asynccontextmanager
async def open_keeper(data: Path, budget: int | None = None, *, download_limit: int = 0) -> AsyncIterator[Keeper]:
    with Store(data) as store:
        async with open_node(download_limit=download_limit) as node:
            yield Keeper(node, store, budget)
