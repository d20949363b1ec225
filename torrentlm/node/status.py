"""What a running node says of itself to other programs of the machine: ``<data>/status.json``, new every second.

A plain file, so that looking at a node costs it nothing and needs no port, and works while it is busy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from torrentlm.node.lane import Lane
    from torrentlm.node.membership import Membership
    from torrentlm.node.node import Node
    from torrentlm.records import Span

FILE = "status.json"
EVERY_S = 1.0
SAME_S = 4.0
"""Where nothing has changed it is written again after so long, to say that it still holds."""
STALE_S = 10.0
"""Older than this, it is what a node left that has ended without a word."""
MAX_BYTES = 4 << 20


def read_status(data: Path) -> dict[str, Any] | None:
    """What the node that uses this data folder last said; None if none runs."""
    try:
        with (data / FILE).open("rb") as file:
            status = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    fresh = isinstance(status, dict) and isinstance(at := status.get("at"), float) and abs(time.time() - at) < STALE_S
    return status if fresh else None


async def keep_status(node: Node) -> None:
    """Write it until cancelled, and remove it then. A disk that takes no file is somebody else's to report."""
    path = node.parts.config.data / FILE
    written: dict[str, Any] = {"at": float("-inf")}
    try:
        while True:
            status = status_of(node)
            if status | {"at": 0.0} != written | {"at": 0.0} or status["at"] - written["at"] > SAME_S:
                with suppress(OSError):
                    _replace(path, json.dumps(status))
                    written = status
            await trio.sleep(EVERY_S)
    finally:
        with suppress(OSError):
            path.unlink()


def _replace(path: Path, content: str) -> None:
    new = path.with_name(f".{FILE}.new")
    new.write_text(content, encoding="utf-8")
    new.replace(path)


def status_of(node: Node) -> dict[str, Any]:
    """Budgets and what is used of them, in bytes; blocks by number; rates in bytes per second; ``at`` in Unix time."""
    config = node.parts.config
    transfers = node.parts.swarm.transfers
    return {
        "at": time.time(),
        "endpoint": str(node.endpoint),
        "models": [_model(membership) for membership in node.memberships.values()],
        "devices": [] if node.computing is None else [_device(lane) for lane in node.computing.lanes],
        "prefetched": node.prefetcher.bytes,
        "sessions": node.sessions,
        "disk": {"used": node.parts.shelf.space.occupied(), "budget": config.disk},
        "rates": {
            "download": sum(transfer.progress.download_rate for transfer in transfers),
            "upload": sum(transfer.progress.upload_rate for transfer in transfers),
        },
    }


def _device(lane: Lane) -> dict[str, Any]:
    holder, memory = lane.holder, lane.memory
    return {
        "device": lane.device.label,
        "name": lane.device.name,
        "weights": {"budget": memory.allowed, "used": memory.used, "pinned": memory.pinned},
        "offloaded": {"budget": lane.aside.allowed, "used": lane.aside.used, "pinned": lane.aside.pinned},
        "kv": {"budget": holder.kv_budget, "used": holder.kv_bytes},
        "sessions": holder.sessions,
        "lost": lane.lost,
    }


def _model(membership: Membership) -> dict[str, Any]:
    record, snapshot = membership.peers.record, membership.snapshot()
    return {
        "name": membership.magnet.name,
        "magnet": str(membership.magnet),
        "precision": record.precision,
        "held": _numbers(record.held),
        "resident": _numbers(record.resident),
        "offered": _numbers(record.offered),
        "fetching": _numbers(record.claimed),
        "peers": snapshot.answered,
    }


def _numbers(spans: Iterable[Span]) -> list[int]:
    return [block for span in spans for block in span]
