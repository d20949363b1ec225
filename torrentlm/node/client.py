"""A node that holds nothing: how a client takes part in a swarm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from torrentlm.client.encoding import embed
from torrentlm.client.handles import ChosenAdapter
from torrentlm.client.model import ModelClient
from torrentlm.client.pooling import Array
from torrentlm.compute.tokenizer import (
    context_length,
    decoder_start,
    has_tokenizer,
    load_tokenizer,
    stop_tokens,
    vocabulary_size,
)
from torrentlm.config import Settings
from torrentlm.errors import ArtifactError, ConfigError, FolderInUseError, StorageError
from torrentlm.manifest.magnet import Magnet
from torrentlm.node.describe import describe_model, describe_network
from torrentlm.node.membership import Membership
from torrentlm.node.node import Node, open_node
from torrentlm.node.parts import Say
from torrentlm.publish.published import copy_model, magnet_of
from torrentlm.records import AdapterId
from torrentlm.structured import single_error
from torrentlm.swarm.discovery import Source
from torrentlm.swarm.store import Store, read_endpoint

JOIN_TIMEOUT_S = 30.0
MAX_CLIENTS = 64


@dataclass(frozen=True, slots=True)
class SwarmClient:
    """A connected client: ``model`` generates; the rest tells what it stands on."""

    model: ModelClient
    node: Node
    membership: Membership

    async def embed(self, texts: Sequence[str], adapter: str | None = None) -> Array:
        """See client.encoding.embed."""
        return await embed(self.model, texts, self.membership.folder, adapter)

    async def stats(self) -> dict[str, Any]:
        return describe_network(self.node, self.membership)

    async def inspect(self) -> dict[str, Any]:
        return describe_model(self.membership, await self.membership.sidecars.find())


@asynccontextmanager
async def open_client(settings: Settings, say: Say = lambda event: None) -> AsyncIterator[SwarmClient]:
    """Join the model that ``settings`` name (a magnet, or a recipe that this data folder has published).

    Raises ConfigError, ArtifactError, NetworkError, StorageError.
    """
    magnet = await trio.to_thread.run_sync(magnet_of_settings, settings)
    beside = read_endpoint(settings.node.data)
    config = replace(settings.node, peers=(*settings.node.peers, *([beside] if beside else [])))
    with single_error():
        async with open_node(config, say, partial(_store_with, magnet)) as node, trio.open_nursery() as nursery:
            membership = await node.join(magnet, timeout=JOIN_TIMEOUT_S)
            tokenizer, ends, limit, vocabulary, start = await trio.to_thread.run_sync(_text_side, membership.folder)
            model = ModelClient(
                node,
                membership,
                membership.id,
                tokenizer,
                nursery,
                max_length=limit,
                vocabulary=vocabulary,
                stop_tokens=ends,
                decoder_start=start,
                adapters=_Adapters(node, membership).find,
                waiting=lambda sentence: say({"event": "waiting", "why": sentence}),
            )
            yield SwarmClient(model, node, membership)
            nursery.cancel_scope.cancel()


class _Adapters:
    """The adapters that this client's sessions name, each looked up once."""

    def __init__(self, node: Node, membership: Membership) -> None:
        self._node = node
        self._membership = membership
        self._found: dict[Magnet, ChosenAdapter] = {}

    async def find(self, link: str) -> ChosenAdapter:
        """Raises ArtifactError for a wrong magnet, NetworkError where nobody has it."""
        magnet = Magnet.parse(link)
        if magnet not in self._found:
            if magnet.v1 is None or magnet.v2 is None:
                raise ArtifactError("the adapter's magnet has only one of its two hashes: copy the whole link")
            self._membership.peers.learn(magnet.peers, Source.MAGNET)
            adapter = AdapterId(magnet.v1, magnet.v2)
            manifest = await self._node.adapters.manifest(self._membership, adapter)
            self._found[magnet] = ChosenAdapter(adapter, manifest.touched)
        return self._found[magnet]


def magnet_of_settings(settings: Settings) -> Magnet:
    """The model's magnet: given, or what the node of this machine published from the recipe."""
    if settings.recipe is None:
        return Magnet.parse(settings.magnet or "")
    magnet = magnet_of(settings.recipe, settings.node.data)
    if magnet is None:
        raise ConfigError("this model.toml has not been published from here yet: start torrentlm seed with it first")
    return magnet


def first_free_store(data: Path) -> Store:
    """A folder below ``data`` that no other client uses: a node and several clients may share ``data`` itself."""
    for number in range(MAX_CLIENTS):
        with suppress(FolderInUseError):
            return Store(data / "clients" / str(number))
    raise StorageError(f"{MAX_CLIENTS} clients use {data} already: choose another folder with --data")


def _store_with(magnet: Magnet, data: Path) -> Store:
    """A client's own, with what this machine knows of the model."""
    store = first_free_store(data)
    try:
        copy_model(magnet, data, store)
    except BaseException:
        store.close()
        raise
    return store


def _text_side(folder: Path) -> tuple[Any, tuple[int, ...], int | None, int, int | None]:
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    vocabulary = vocabulary_size(folder) or (0 if tokenizer is None else len(tokenizer))
    return tokenizer, stop_tokens(folder, tokenizer), context_length(folder), vocabulary, decoder_start(folder)
