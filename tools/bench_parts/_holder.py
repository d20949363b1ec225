"""A holder process, and what the system says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


class Holder:
    """A ``torrentlm seed --json`` process."""

    def __init__(self, model: str, data: Path, *options: str) -> None:
        command = [sys.executable, "-m", "torrentlm", "seed", model, "--data", str(data), "--json", *options]
        common = ["--host", "127.0.0.1", "--port", "0", "--dht-bootstrap", "none"]
        self._process = subprocess.Popen([*command, *common], stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def wait_ready(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "ready":
                return event
        raise RuntimeError("a holder ended before it was ready")

    def wire_bytes(self) -> int:
        """Bytes that this process has sent to other processes on its open connections, as the kernel counts them.

        Connections to itself are left out: the gateway and libtorrent talk through the loopback device too.
        """
        found = subprocess.run(["ss", "-tinpH", "state", "established"], capture_output=True, text=True, check=True)
        lines = found.stdout.splitlines()
        own = [(line.split(), details) for line, details in pairwise(lines) if f"pid={self.pid}," in line]
        here = {words[2] for words, _ in own}
        sent = [details.partition("bytes_sent:")[2].split(" ")[0] for words, details in own if words[3] not in here]
        return sum(int(count or 0) for count in sent)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def pss_of(pid: int) -> int:
    """Proportional set size in bytes: shared pages count by their share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say how much memory a process takes")


def processor_seconds(pid: int) -> float:
    """What the process has used of the processor so far, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
