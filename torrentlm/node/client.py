"""A node that holds nothing: how a client takes part in a swarm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from torrentlm.client.model import ModelClient
from torrentlm.compute.skeleton import read_config
from torrentlm.compute.tokenizer import load_tokenizer, stop_tokens
from torrentlm.config import Settings
from torrentlm.errors import ConfigError
from torrentlm.manifest.magnet import Magnet
from torrentlm.node.describe import describe_model, describe_network
from torrentlm.node.membership import Membership
from torrentlm.node.node import Node, open_node
from torrentlm.node.parts import Say
from torrentlm.structured import single_error

JOIN_TIMEOUT_S = 60.0
MAX_CLIENTS = 64


@dataclass(frozen=True, slots=True)
class SwarmClient:
    """A connected client: ``model`` generates; the rest tells what it stands on."""

    model: ModelClient
    node: Node
    membership: Membership

    async def stats(self) -> dict[str, Any]:
        return describe_network(self.node, self.membership)

    async def inspect(self) -> dict[str, Any]:
        return describe_model(self.membership)


@asynccontextmanager
async def open_client(settings: Settings, say: Say = lambda event: None) -> AsyncIterator[SwarmClient]:
    """Join the model that ``settings`` name (a magnet, or a recipe that this data folder has published).

    Raises ConfigError, ArtifactError, NetworkError, StorageError.
    """
    if settings.magnet is None:
        raise ConfigError(
            "this model.toml publishes a model: start torrentlm seed with it, then use the magnet it prints"
        )
    magnet = Magnet.parse(settings.magnet)
    with single_error():
        async with open_node(settings.node, say) as node, trio.open_nursery() as nursery:
            membership = await node.join(magnet, timeout=JOIN_TIMEOUT_S)
            tokenizer, ends, limit = await trio.to_thread.run_sync(_text_side, membership.folder)
            model = ModelClient(
                node,
                membership,
                membership.id,
                tokenizer,
                nursery,
                max_length=limit,
                stop_tokens=ends,
                waiting=lambda sentence: say({"event": "waiting", "why": sentence}),
            )
            yield SwarmClient(model, node, membership)
            nursery.cancel_scope.cancel()


def _text_side(folder: Path) -> tuple[Any, tuple[int, ...], int | None]:
    tokenizer = load_tokenizer(folder)
    limit = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    return tokenizer, stop_tokens(folder, tokenizer), limit if isinstance(limit, int) else None
