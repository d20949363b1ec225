"""What a holder's process takes of memory beside its weights and KV-caches, and of the processor when idle.

A holder of all of SmolLM2-135M-Instruct is looked at from outside, through a whole run: it joins, fetches, loads,
serves several sessions at once, and is left alone. Its memory is the proportional set size that Linux accounts it,
sampled all the time; the weights and KV-caches are what ``torrentlm status`` says of it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _holder import Holder, processor_seconds, pss_of

import torrentlm
from torrentlm.cli.demo import find_recipe
from torrentlm.node.status import read_status

ALLOWED = 450e6
"""Bytes beside weights and KV-caches; an interpreter with torch and transformers takes most of it."""
EVERY_S = 0.05
SPEAKS_S = 1.5
SETTLE_S = 5.0
PROMPT = "Once upon a time, in a small village by the sea, there lived"


@dataclass(frozen=True, slots=True)
class Sample:
    """At ``time`` (seconds): bytes of the process, and of the weights and KV-caches that it last said it has."""

    time: float
    pss: int
    said: int


def run(
    runs: int = 1, precision: str = "F32", ram: str = "2GB", sessions: int = 4, tokens: int = 64, idle: float = 30.0
) -> dict[str, Any]:
    """``sessions`` at once, ``tokens`` each, under a budget of ``ram``; then ``idle`` seconds of nothing."""
    found = [measure(precision, ram, sessions, tokens, idle) for _ in range(runs)]
    worst = max(found, key=lambda each: each["beside_MB"])
    return {
        "unit": "MB beside weights and KV",
        "ours": worst["beside_MB"],
        "reference": ALLOWED / 1e6,
        "ratio": worst["beside_MB"] * 1e6 / ALLOWED,
        "precision": precision,
        "ram": ram,
        **{key: max(each[key] for each in found) for key in found[0] if key != "beside_MB"},
        "runs": found,
    }


def measure(precision: str, ram: str, sessions: int, tokens: int, idle: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as place, ExitStack() as stack:
        publisher = Holder(str(find_recipe()), Path(place, "publisher"), "--blocks", "none")
        stack.callback(publisher.end)
        magnet = publisher.wait_ready()["magnet"]
        data = Path(place, "holder")
        holder = Holder(magnet, data, "--blocks", "0-31", "--precision", precision, "--ram", ram)
        stack.callback(holder.end)
        sampler = stack.enter_context(Sampler(holder.pid, data))
        magnet = holder.wait_ready()["magnet"]  # with its own address
        publisher.end()
        client = Path(place, "client")
        with (
            torrentlm.connect(magnet, data=client, port=0, dht_bootstrap=["none"]) as model,
            ThreadPoolExecutor(sessions) as threads,
        ):
            list(threads.map(lambda number: generate(model, number, tokens), range(sessions)))
        time.sleep(SETTLE_S)
        used = processor_seconds(holder.pid)
        time.sleep(idle)
        used = processor_seconds(holder.pid) - used
        budget = sampler.budget
    return {
        "beside_MB": beside(sampler.samples) / 1e6,
        "peak_MB": max(sample.pss for sample in sampler.samples) / 1e6,
        "said_MB": max(sample.said for sample in sampler.samples) / 1e6,
        "budget_MB": budget / 1e6,
        "samples": len(sampler.samples),
        "idle_processor_percent": 100 * used / idle,
    }


def beside(samples: list[Sample]) -> int:
    """The most that the process ever had beside what it said: just before or after, as it speaks once a second."""

    def said(at: float) -> int:
        return max(sample.said for sample in samples if abs(sample.time - at) <= SPEAKS_S)

    return max(sample.pss - said(sample.time) for sample in samples)


def generate(model: torrentlm.Model, number: int, tokens: int) -> None:
    model.generate(f"{number}. {PROMPT}", max_new_tokens=tokens)


class Sampler:
    """Looks at a process until it is left, in a thread. ``budget``: the most that weights and KV may ever be."""

    def __init__(self, pid: int, data: Path) -> None:
        self.samples: list[Sample] = []
        self.budget = 0
        self._pid, self._data = pid, data
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        said = 0
        while not self._ended.wait(EVERY_S):
            if (status := read_status(self._data)) is not None:
                kinds = [device[kind] for device in status["devices"] for kind in ("weights", "kv")]
                said = sum(kind["used"] for kind in kinds)
                self.budget = max(self.budget, sum(kind["budget"] for kind in kinds))
            self.samples.append(Sample(time.monotonic(), pss_of(self._pid), said))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
