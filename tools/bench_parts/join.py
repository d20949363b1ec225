"""Eight empty nodes that join at once and fetch a whole model, against one alone; seconds until the last has it all.

All links have the same rate in both directions, the publisher's too: a server that sent eight copies would take eight
times as long, a swarm that shares at once what it has hardly longer than one peer alone. A network lab (namespaces on
this machine), processes from their start on, a random model. The two take turns.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _lab_nodes import MBIT, LabNode, publish
from _small import make_recipe
from netlab_parts.lab import Lab, measured_rate


def run(runs: int = 3, holders: int = 8, mbit: float = 16.0, layers: int = 16, hidden: int = 512) -> dict[str, Any]:
    """``holders`` at once, every link of ``mbit`` Mbit/s; the model has about ``28 * layers * hidden**2`` bytes."""
    rate = int(mbit * MBIT)
    many: list[dict[str, Any]] = []
    one: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as place:
        folder = Path(place)
        recipe = make_recipe(folder, layers, hidden)
        publish(recipe, folder / "publisher")
        size = sum(path.stat().st_size for path in (folder / "publisher" / "blocks").iterdir())
        with Lab() as lab:
            hosts = [lab.add_host(name, up=rate, down=rate) for name in ("publisher", *_names(holders))]
            measured = measured_rate(hosts[0], hosts[1])
            publisher = LabNode(hosts[0], str(recipe), folder / "publisher", "--blocks", "none")
            magnet = publisher.wait_ready()["magnet"]
            for number in range(runs):
                one.append(_join(magnet, hosts[:2], folder / f"one-{number}"))
                many.append(_join(magnet, hosts, folder / f"many-{number}"))
    ours, reference = (statistics.median(each["seconds"] for each in side) for side in (many, one))
    return {
        "unit": "s",
        "ours": ours,
        "reference": reference,
        "ratio": ours / reference,
        "goal": 1.5,
        "holders": holders,
        "bytes": size,
        "link_Mbit_per_s": mbit,
        "measured_payload_Mbit_per_s": measured / MBIT,
        "limit_s": size * 8 / rate,
        "publisher_sent_copies": statistics.median(each["sent"] / size for each in many),
        "first_of_many_s": statistics.median(each["each"][0] for each in many),
        "runs": {"ours": [each["seconds"] for each in many], "reference": [each["seconds"] for each in one]},
    }


def _names(holders: int) -> list[str]:
    return [f"holder-{number}" for number in range(1, holders + 1)]


def _join(magnet: str, hosts: list[Any], folder: Path) -> dict[str, Any]:
    """All ``hosts`` but the first, the publisher, join. Seconds from the first one's start, when each was complete."""
    folder.mkdir()
    before, _ = hosts[0].traffic()
    with ExitStack() as stack:
        nodes = []
        for host in hosts[1:]:
            node = LabNode(host, magnet, folder / host.name, "--blocks", "none", "--mirror")
            stack.callback(node.end)
            nodes.append(node)
        each = sorted(node.wait_ready()["at"] - nodes[0].started for node in nodes)
        after, _ = hosts[0].traffic()
    return {"seconds": each[-1], "each": each, "sent": after - before}
