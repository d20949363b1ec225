"""Bare nodes for tests of swarm and gateway: no models, no holders. Several in one process, all on 127.0.0.1."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from torrentlm.gateway.gateway import Gateway
from torrentlm.manifest.torrent import Hasher, Torrent, multi_file, piece_length, single_file
from torrentlm.records import Endpoint
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.session import Swarm

AsyncTest = Callable[..., Awaitable[None]]


def in_trio(seconds: float) -> Callable[[AsyncTest], Callable[..., None]]:
    """Run an async test; it fails after so many seconds."""

    def decorate(test: AsyncTest) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            async def main() -> None:
                with trio.fail_after(seconds):
                    await test(**fixtures)

            trio.run(main)

        return run

    return decorate


@dataclass(frozen=True, slots=True)
class BareNode:
    identity: Identity
    gateway: Gateway
    swarm: Swarm

    @property
    def endpoint(self) -> Endpoint:
        return self.gateway.endpoint


@asynccontextmanager
async def open_node(
    bootstrap: Sequence[Endpoint] = (), port: int = 0, *, download_limit: int = 0, upload_limit: int = 0
) -> AsyncIterator[BareNode]:
    """A gateway and a swarm behind it, until the context ends."""
    identity = Identity.generate()
    async with trio.open_nursery() as nursery:
        gateway = Gateway(identity, host="127.0.0.1", port=port)
        await nursery.start(gateway.run)
        swarm = Swarm(gateway.proxy, identity, bootstrap, download_limit=download_limit, upload_limit=upload_limit)
        await nursery.start(swarm.run)
        gateway.torrents = swarm
        try:
            yield BareNode(identity, gateway, swarm)
        finally:
            nursery.cancel_scope.cancel()


def make_block(folder: Path, size: int = 3_000_000) -> tuple[Torrent, bytes]:
    """A file of random bytes in ``folder`` under its content's name, its torrent, and the bytes."""
    content = os.urandom(size)
    hasher = Hasher(piece_length(size))
    hasher.update(content)
    hashes = hasher.finish()
    torrent = single_file(f"{hashes.root.hex()}.safetensors", hashes, piece_length(size))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / torrent.name).write_bytes(content)
    return torrent, content


def make_model(folder: Path) -> tuple[Torrent, dict[str, bytes]]:
    """A multi-file torrent with pad files, like a model torrent, its files in ``folder``; their contents by path."""
    contents = {"manifest.msgpack": os.urandom(100_001), "blocks/a.torrent": os.urandom(900_000), "config.json": b"{}"}
    torrent = multi_file("model", contents)
    for path, content in contents.items():
        target = folder / torrent.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return torrent, contents
