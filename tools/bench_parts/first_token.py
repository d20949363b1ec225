"""From a magnet to the first token: one publisher, three empty holders of a third of the blocks each, and a client.

Every link has the same rate. The limit: the publisher's uplink carries every block once, so bytes of all block files /
link rate. Holders and client start together; what their interpreters take counts. A network lab on this machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _lab_nodes import LIMIT_S, MBIT, LabNode, publish
from _small import make_recipe
from netlab_parts.lab import Host, Lab, measured_rate

from torrentlm.cli.demo import find_recipe, thirds

CLIENT = str(Path(__file__).with_name("_lab_client.py"))


def run(runs: int = 3, mbit: float = 100.0, quick: bool = False) -> dict[str, Any]:
    """SmolLM2 on links of ``mbit`` Mbit/s; ``quick``: a random model of 30 MB instead."""
    rate = int(mbit * MBIT)
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as place:
        folder = Path(place)
        recipe = make_recipe(folder, layers=4, hidden=512) if quick else find_recipe()
        publish(recipe, folder / "publisher")
        size = sum(path.stat().st_size for path in (folder / "publisher" / "blocks").iterdir())
        with Lab() as lab:
            names = ("publisher", "client", "holder-1", "holder-2", "holder-3")
            hosts = [lab.add_host(name, up=rate, down=rate) for name in names]
            measured = measured_rate(hosts[0], hosts[1])
            publisher = LabNode(hosts[0], str(recipe), folder / "publisher", "--blocks", "none")
            ready = publisher.wait_ready()
            tries = [_try(ready, hosts, folder / str(number)) for number in range(runs)]
    limit = size * 8 / rate
    ours = statistics.median(each["seconds"] for each in tries)
    return {
        "unit": "s",
        "ours": ours,
        "reference": limit,
        "ratio": ours / limit,
        "goal": 1.25,
        "bytes": size,
        "link_Mbit_per_s": mbit,
        "measured_payload_Mbit_per_s": measured / MBIT,
        "served_after_complete_s": [each["served_after_complete"] for each in tries],
        "first_served_s": [each["first_served"] for each in tries],
        "publisher_sent_copies": statistics.median(each["sent"] / size for each in tries),
        "runs": [each["seconds"] for each in tries],
    }


def _try(ready: dict[str, Any], hosts: list[Host], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    magnet = str(ready["magnet"])
    before, _ = hosts[0].traffic()
    began = time.monotonic()
    with ExitStack() as stack:
        holders = []
        for host, span in zip(hosts[2:], thirds(int(ready["blocks_total"])), strict=True):
            holders.append(LabNode(host, magnet, folder / host.name, "--blocks", str(span)))
            stack.callback(holders[-1].end)
        command = [sys.executable, CLIENT, magnet, str(folder / "client")]
        with hosts[1].start(command, stdout=subprocess.PIPE, text=True) as client:
            printed, _ = client.communicate(timeout=LIMIT_S + 60)
        seconds = time.monotonic() - began
        if "token" not in printed:
            raise RuntimeError("the client got no token")
        after, _ = hosts[0].traffic()
        moments = [_moments(holder) for holder in holders]
    return {
        "seconds": seconds,
        "sent": after - before,
        "served_after_complete": [served - complete for complete, served in moments],
        "first_served": [served - began for _, served in moments],
    }


def _moments(holder: LabNode) -> tuple[float, float]:
    """When a holder's first block was complete on disk, and when it served the first."""
    return tuple(  # type: ignore[return-value]
        next(event["at"] for event in holder.events if event["event"] == "blocks" and event["state"] == state)
        for state in ("complete", "served")
    )
