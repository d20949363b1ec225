"""Round trips of 8 KiB on a pipe between two nodes on loopback: idle, and while the same connection is saturated with
pieces.

The reference is a bare trio TCP stream between two processes. Milliseconds.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from _blocks import make_blocks
from _peer import Peer, median_ms, peer, quantile

SIZE = 8192
WARM_UP = 200


def run(runs: int, total: int = 420_000_000, count: int = 2000) -> dict[str, Any]:
    """``count`` idle round trips per run; one torrent of ``total`` bytes to saturate the connection with."""
    bare: list[list[float]] = []
    idle: list[list[float]] = []
    busy: list[list[float]] = []
    speeds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as folder:
        source = Path(folder, "source")
        source.mkdir()
        torrents = make_blocks(source, 1, total)
        for number in range(runs):
            with peer("bare") as near, peer("bare") as far:
                bare.append(pings(near, far, count))
            with peer("node") as near, peer("node", "echo") as far:
                target = Path(folder, str(number))
                target.mkdir()
                far.ask(do="add", torrents=torrents, folder=str(source), verified=True)
                near.ask(do="add", torrents=torrents, folder=str(target), verified=False)
                answer = near.ask(do="saturated", peer=far.endpoint, size=SIZE)
                if answer["connections"] != 1:
                    raise RuntimeError("the pipe did not travel on the connection that carried the pieces")
                busy.append(answer["times"])
                speeds.append(total / 1e6 / answer["seconds"])
                idle.append(pings(near, far, count))
    ours, reference = (statistics.median(map(median_ms, times)) for times in (idle, bare))
    return {
        "unit": "ms",
        "ours": ours,
        "reference": reference,
        "ratio": ours / reference,
        "runs": {"ours": [median_ms(times) for times in idle], "reference": [median_ms(times) for times in bare]},
        "idle_p95": statistics.median(quantile(times, 0.95) for times in idle),
        "saturated": statistics.median(map(median_ms, busy)),
        "saturated_p95": statistics.median(quantile(times, 0.95) for times in busy),
        "saturated_runs": [(len(times), median_ms(times), quantile(times, 0.95)) for times in busy],
        "saturated_MB_per_s": statistics.median(speeds),
    }


def pings(near: Peer, far: Peer, count: int) -> list[float]:
    times: list[float] = near.ask(do="idle", peer=far.endpoint, size=SIZE, count=WARM_UP + count)["times"]
    return times[WARM_UP:]
