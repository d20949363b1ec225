"""A model and its swarm as plain values, for ``inspect``, ``/stats`` and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import TensorSpec, read_canonical
from torrentlm.manifest.manifest import BlockEntry, Manifest
from torrentlm.route.registry import Snapshot

if TYPE_CHECKING:
    from torrentlm.node.membership import Membership
    from torrentlm.node.node import Node


def describe_model(membership: Membership) -> dict[str, Any]:
    """What ``torrentlm inspect --json`` prints for a model."""
    manifest = membership.manifest
    snapshot = membership.snapshot()
    return {
        "name": manifest.name,
        "magnet": str(membership.magnet),
        "v1": membership.magnet.v1.hex() if membership.magnet.v1 else None,
        "v2": membership.id.hex(),
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "layers": manifest.layers,
        "size": manifest.size,
        "peers_known": snapshot.known,
        "peers_answered": snapshot.answered,
        "blocks": describe_blocks(manifest, snapshot, membership.files.on_this_machine()),
    }


def describe_blocks(manifest: Manifest, snapshot: Snapshot, files_here: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One object a block: its files and hashes, and which peers serve it or have it on disk.

    ``tensors`` are its tensors under the checkpoint's names, or None unless all its files are among ``files_here``,
    the complete files on this machine by name.
    """
    blocks = []
    for number, entry in enumerate(manifest.blocks):
        files = manifest.block_files(number)
        serving = [str(peer.endpoint) for peer in snapshot.candidates if any(number in span for span in peer.resident)]
        seeding = [str(peer.endpoint) for peer in snapshot.candidates if any(number in span for span in peer.held)]
        blocks.append(
            {
                "block": number,
                "kind": entry.kind,
                "layers": None if entry.layers is None else str(entry.layers),
                "size": sum(file.size for file in files),
                "files": [file.name for file in files],
                "v1": [file.v1.hex() for file in files],
                "v2": [file.v2.hex() for file in files],
                "serving": serving,
                "seeding": seeding,
                "tensors": _describe_tensors(manifest, entry, files_here),
            }
        )
    return blocks


def _describe_tensors(manifest: Manifest, entry: BlockEntry, files_here: Mapping[str, Path]) -> list[Any] | None:
    names = [manifest.files[part.file].name for part in entry.files]
    if not all(name in files_here for name in names):
        return None
    try:
        return [
            {"name": part.full_name(spec.name), "dtype": spec.dtype, "shape": list(spec.shape)}
            for part, name in zip(entry.files, names, strict=True)
            for spec in _tensors_of(files_here[name])
        ]
    except (OSError, ArtifactError):
        return None  # removed or damaged since


@lru_cache(maxsize=4096)
def _tensors_of(path: Path) -> tuple[TensorSpec, ...]:
    """What a block file's header names: a few kilobytes, read once, as the content never changes under its name."""
    with path.open("rb") as file:
        layout = read_canonical(file, path.stat().st_size, path.name)
    return tuple(placed.tensor for placed in layout.tensors)


def describe_network(node: Node, membership: Membership) -> dict[str, Any]:
    """This node's connections, as plain values; times in milliseconds."""
    snapshot = membership.snapshot()
    pipes = node.parts.gateway.pipes.values()
    return {
        "peers_known": snapshot.known,
        "peers_answered": snapshot.answered,
        "pipes": [
            {"peer": str(pipe.endpoint), "rtt_ms": None if pipe.rtt is None else round(pipe.rtt * 1000, 2)}
            for pipe in pipes
        ],
        "pipe_bytes_sent": sum(pipe.bytes_sent for pipe in pipes),
        "pipe_bytes_received": sum(pipe.bytes_received for pipe in pipes),
    }
