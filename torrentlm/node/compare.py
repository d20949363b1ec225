"""Two models side by side: which blocks they share, as one file in one swarm, and which they do not.

Blocks are named by their content, so there is nothing to compare but names: no weights, and for models that this data
folder knows no network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from torrentlm.config import Settings
from torrentlm.manifest.magnet import Magnet
from torrentlm.manifest.manifest import Manifest
from torrentlm.node.client import JOIN_TIMEOUT_S, first_free_store, magnet_of_settings
from torrentlm.node.node import Node, open_node
from torrentlm.node.parts import Say
from torrentlm.publish.published import stored_manifest
from torrentlm.structured import single_error
from torrentlm.swarm.store import read_endpoint

_Place = tuple[int, str, str | None]
"""Which side of the model (an encoder-decoder has two), which kind of block, which layers."""


async def compare(first: Settings, second: Settings, say: Say = lambda event: None) -> dict[str, Any]:
    """What ``torrentlm inspect --diff --json`` prints; the first one's settings say how to reach the swarm.

    Raises ConfigError, ArtifactError, NetworkError, StorageError.
    """
    named = [await trio.to_thread.run_sync(_look_up, settings) for settings in (first, second)]
    missing = [magnet for magnet, manifest in named if manifest is None]
    fetched = await _fetch(missing, first, say) if missing else {}
    (a, a_manifest), (b, b_manifest) = ((magnet, manifest or fetched[magnet]) for magnet, manifest in named)
    return describe_difference((a, a_manifest), (b, b_manifest))


def _look_up(settings: Settings) -> tuple[Magnet, Manifest | None]:
    magnet = magnet_of_settings(settings)
    return magnet, stored_manifest(magnet, settings.node.data)


async def _fetch(magnets: list[Magnet], settings: Settings, say: Say) -> dict[Magnet, Manifest]:
    beside = read_endpoint(settings.node.data)
    config = replace(settings.node, peers=(*settings.node.peers, *([beside] if beside else [])))
    found: dict[Magnet, Manifest] = {}

    async def join(node: Node, magnet: Magnet) -> None:
        found[magnet] = (await node.join(magnet, timeout=JOIN_TIMEOUT_S)).manifest

    with single_error():
        async with open_node(config, say, first_free_store) as node, trio.open_nursery() as nursery:
            for magnet in dict.fromkeys(magnets):
                nursery.start_soon(join, node, magnet)
    return found


def describe_difference(first: tuple[Magnet, Manifest], second: tuple[Magnet, Manifest]) -> dict[str, Any]:
    """Both models, a row per block, and totals. Bytes count each file once.

    ``shared_bytes`` are in files that both have, ``fetch_bytes`` in those that a node that has ``a`` still needs for
    ``b``, and ``disk_bytes`` what both take together.
    """
    (a_magnet, a), (b_magnet, b) = first, second
    rows = _rows(a, b)
    shared = sum(file.size for file in a.files if file.v2 in _files(b))
    return {
        "a": a.name,
        "a_magnet": str(a_magnet),
        "a_bytes": a.size,
        "b": b.name,
        "b_magnet": str(b_magnet),
        "b_bytes": b.size,
        "same": sum(row["state"] == "same" for row in rows),
        "different": sum(row["state"] == "differs" for row in rows),
        "only_in_a": sum(row["state"] == "only in a" for row in rows),
        "only_in_b": sum(row["state"] == "only in b" for row in rows),
        "shared_bytes": shared,
        "fetch_bytes": b.size - shared,
        "disk_bytes": a.size + b.size - shared,
        "blocks": rows,
    }


def _rows(a: Manifest, b: Manifest) -> list[dict[str, Any]]:
    """Blocks of the same layers (or stems, or heads) side by side, in ``a``'s order; then those that only ``b`` has."""
    in_a, in_b = _by_place(a), _by_place(b)
    places = list(dict.fromkeys((*in_a, *in_b)))
    places.sort(key=lambda place: (place[0], ("stem", "layers", "head").index(place[1])))  # stable: their order stays
    return [_row(place, (a, in_a.get(place)), (b, in_b.get(place))) for place in places]


def _row(place: _Place, first: tuple[Manifest, int | None], second: tuple[Manifest, int | None]) -> dict[str, Any]:
    (a, a_block), (b, b_block) = first, second
    a_files = () if a_block is None else a.block_files(a_block)
    b_files = () if b_block is None else b.block_files(b_block)
    if a_block is None or b_block is None:
        state = "only in b" if a_block is None else "only in a"
    else:
        state = "same" if {file.v2 for file in a_files} == {file.v2 for file in b_files} else "differs"
    known = _files(a)
    a_bytes, b_bytes = sum(file.size for file in a_files), sum(file.size for file in b_files)
    fetch = sum(file.size for file in b_files if file.v2 not in known)
    return {
        "side": place[0],
        "kind": place[1],
        "layers": place[2],
        "a": a_block,
        "b": b_block,
        "state": state,
        "a_bytes": a_bytes,
        "b_bytes": b_bytes,
        "shared_bytes": b_bytes - fetch,
        "fetch_bytes": fetch,
        "a_v1": [file.v1.hex() for file in a_files],
        "a_v2": [file.v2.hex() for file in a_files],
        "b_v1": [file.v1.hex() for file in b_files],
        "b_v2": [file.v2.hex() for file in b_files],
    }


def _by_place(manifest: Manifest) -> dict[_Place, int]:
    """Block numbers by what the blocks are."""
    return {
        (manifest.side_of(number), entry.kind, None if entry.layers is None else str(entry.layers)): number
        for number, entry in enumerate(manifest.blocks)
    }


def _files(manifest: Manifest) -> frozenset[bytes]:
    return frozenset(file.v2 for file in manifest.files)
