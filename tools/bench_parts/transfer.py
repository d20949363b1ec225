"""A set of blocks from one node to another on loopback, through both gateways, against two plain libtorrent sessions.

Same torrents, same settings, one process per end; runs alternate, so that whatever else the machine does hits both.
MB/s from the first byte of a piece to the last piece verified.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from _blocks import make_blocks
from _peer import peer

TOTAL = 420_000_000


def run(runs: int, blocks: int = 30, total: int = TOTAL) -> dict[str, Any]:
    """``blocks`` files of together ``total`` bytes, each its own torrent."""
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as folder:
        source = Path(folder, "source")
        source.mkdir()
        size = total // blocks
        torrents = make_blocks(source, blocks, size)
        results: dict[str, list[dict[str, float]]] = {"plain": [], "node": []}
        for number in range(runs):
            for kind in results:
                target = Path(folder, f"{kind}-{number}")
                target.mkdir()
                results[kind].append(transfer(kind, torrents, source, target))
                check(source, target, blocks)

    def both(name: str) -> dict[str, float]:
        ours, reference = (statistics.median(each[name] for each in results[kind]) for kind in ("node", "plain"))
        return {"ours": ours, "reference": reference}

    speeds = {kind: [blocks * size / 1e6 / each["seconds"] for each in results[kind]] for kind in results}
    ours, reference = statistics.median(speeds["node"]), statistics.median(speeds["plain"])
    return {
        "unit": "MB/s",
        "ours": ours,
        "reference": reference,
        "ratio": ours / reference,
        "runs": {"ours": speeds["node"], "reference": speeds["plain"]},
        "bytes": blocks * size,
        "blocks": blocks,
        "first_byte_s": both("first_byte_s"),
        "cpu_s_of_both_ends": both("cpu_s"),
    }


def transfer(kind: str, torrents: list[str], source: Path, target: Path) -> dict[str, float]:
    with peer(kind) as seed, peer(kind) as leech:
        seed.ask(do="add", torrents=torrents, folder=str(source), verified=True)
        leech.ask(do="add", torrents=torrents, folder=str(target), verified=False)
        before = seed.ask(do="cpu")["seconds"] + leech.ask(do="cpu")["seconds"]
        result = leech.ask(do="fetch", peer=seed.endpoint)
        after = seed.ask(do="cpu")["seconds"] + leech.ask(do="cpu")["seconds"]
        return result | {"cpu_s": after - before}


def check(source: Path, target: Path, blocks: int) -> None:
    """The files are the same; the copies make room."""
    for number in range(blocks):
        name = f"block-{number}.safetensors"
        if Path(source, name).read_bytes() != Path(target, name).read_bytes():
            raise RuntimeError(f"{name} was not transferred unchanged")
        Path(target, name).unlink()
