"""torrentlm in a network lab's hosts: a published model, nodes that are started, heard and ended."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netlab_parts.lab import Host, end

TORRENTLM = (sys.executable, "-m", "torrentlm")
PORT = 6881
MBIT = 1_000_000
LIMIT_S = 900.0
"""No wait of a bench is longer than this."""

Event = dict[str, Any]


def publish(recipe: Path, data: Path) -> None:
    """``torrentlm publish``, outside of the lab: what it takes is not measured."""
    command = [*TORRENTLM, "publish", str(recipe), "--data", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"publishing failed: {done.stderr.strip()}")


class LabNode:
    """``torrentlm seed … --json`` in a host. Each event gets ``at``: the ``time.monotonic()`` at which it was heard."""

    def __init__(self, host: Host, model: str, data: Path, *options: str) -> None:
        self.host = host
        self.events: list[Event] = []
        self.started = time.monotonic()
        self._log = data.with_name(f"{data.name}.log")
        where = ("--data", str(data), "--host", host.address, "--port", str(PORT), "--dht-bootstrap", "none")
        with self._log.open("wb") as log:
            self._process = host.start(
                [*TORRENTLM, "seed", model, *where, "--json", *options], stdout=subprocess.PIPE, stderr=log
            )
        self._arriving: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_for(self, wanted: Callable[[Event], bool]) -> Event:
        """The next event that is ``wanted``."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                event = self._arriving.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"{self.host.name} has not come so far within {LIMIT_S:.0f} s") from None
            if event is None:
                raise RuntimeError(f"{self.host.name} ended too early: {self._log.read_text().strip()}")
            if wanted(event):
                return event

    def wait_ready(self) -> Event:
        return self.wait_for(lambda event: event["event"] == "ready")

    def end(self) -> None:
        end(self._process)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                event = json.loads(line) | {"at": time.monotonic()}
                self.events.append(event)
                self._arriving.put(event)
        self._arriving.put(None)
