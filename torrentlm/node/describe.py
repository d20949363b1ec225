"""A model and its swarm as plain values, for ``inspect``, ``/stats`` and scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torrentlm.manifest.manifest import Manifest
from torrentlm.route.registry import Snapshot

if TYPE_CHECKING:
    from torrentlm.node.membership import Membership
    from torrentlm.node.node import Node
    from torrentlm.node.sidecars import Found


def describe_model(membership: Membership, proof: Found | None) -> dict[str, Any]:
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
        "proof": None if proof is None else proof.described(),
        "blocks": describe_blocks(manifest, snapshot),
    }


def describe_blocks(manifest: Manifest, snapshot: Snapshot) -> list[dict[str, Any]]:
    """One object a block: its files and hashes, which peers serve it or have it on disk, and its tensors."""
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
                "tensors": [spec.described() for spec in manifest.block_tensors(number)],
            }
        )
    return blocks


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
