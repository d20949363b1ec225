"""``python -m tests.unit.publish.measured MODEL_TOML DATA``: publish, watched from within; prints one JSON object.

``idle``: PSS of the process before it imports anything heavy; ``peak``: the most seen while publishing; bytes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

INTERVAL_S = 0.02


def pss() -> int:
    """This process's proportional set size: its memory, with shared pages divided among those who share them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in smaps_rollup")


def main(recipe_file: Path, data: Path) -> None:
    idle = peak = pss()
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(INTERVAL_S):
            peak = max(peak, pss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        from torrentlm.config import load
        from torrentlm.publish.publish import publish
        from torrentlm.swarm.store import Store

        recipe = load(recipe_file).recipe
        assert recipe is not None
        with Store(data) as store:
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                published = publish(recipe, store)
                seconds.append(time.perf_counter() - began)
    finally:
        finished.set()
        watcher.join()
    largest = max(
        sum(file.size for file in published.manifest.block_files(block))
        for block in range(len(published.manifest.blocks))
    )
    report = {"idle": idle, "peak": peak, "largest_block": largest, "seconds": seconds, "magnet": str(published.magnet)}
    print(json.dumps(report | {"folder": str(published.folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
