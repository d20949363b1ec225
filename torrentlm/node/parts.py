"""What a node is made of, for those of its parts that need the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torrentlm.config import NodeConfig
from torrentlm.gateway.gateway import Gateway
from torrentlm.node.shelf import Shelf
from torrentlm.records import NodeKey
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.store import Store

Say = Callable[[dict[str, Any]], None]
"""Takes the events that ``torrentlm seed --json`` prints; called in the event loop, must not block."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Each has one owner, the node; the nursery that runs them outlives whoever gets this."""

    key: NodeKey
    config: NodeConfig
    store: Store
    swarm: Swarm
    gateway: Gateway
    shelf: Shelf
    say: Say
