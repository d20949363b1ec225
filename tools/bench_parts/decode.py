"""Greedy decoding of SmolLM2-135M-Instruct through three holder processes on loopback, tokens per second.

The reference is transformers' generate in one process, same weights, dtype and threads. The two take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _holder import Holder, pss_of

import torrentlm
from torrentlm.cli.demo import find_recipe
from torrentlm.config import load
from torrentlm.publish.source import locate

SPANS = ("0-10", "11-20", "21-31")
PROMPT = "Once upon a time, in a small village by the sea, there lived"


def run(runs: int, tokens: int = 64, dtype: str = "F32", threads: int = 0) -> dict[str, Any]:
    """``tokens`` new tokens per run; each side warms up with one run that is not counted. ``threads`` 0: all cores."""
    threads = threads or len(os.sched_getaffinity(0))
    recipe = find_recipe()
    gguf = locate(load(recipe).recipe).path  # type: ignore[arg-type]
    ours: list[dict[str, Any]] = []
    reference: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-") as folder, ExitStack() as stack:
        idle = stack.enter_context(_idle_process())
        magnet, holders = stack.enter_context(_holders(Path(folder), recipe, dtype, threads))
        whole = stack.enter_context(_Talker("_whole.py", str(gguf), dtype, str(threads)))
        whole.hear()
        client = Path(folder, "client")
        model = stack.enter_context(torrentlm.connect(magnet, data=client, port=0, dht_bootstrap=["none"]))
        for number in range(runs + 1):
            model.generate(PROMPT, max_new_tokens=tokens)
            result = model.last
            assert result is not None
            theirs = whole.ask(prompt=PROMPT, tokens=tokens)
            if number:
                reference.append(theirs)
                ours.append(
                    {
                        "tokens_per_second": result.tokens_per_second,
                        "time_to_first_token_s": result.time_to_first_token_s,
                        "same_tokens": list(result.tokens) == theirs["tokens"],
                    }
                )
        wire = _wire_bytes_per_token(model, holders, tokens)
        memory = [pss_of(holder.pid) for holder in holders]
        baseline = pss_of(idle)

    def median(results: list[dict[str, Any]], key: str) -> float:
        return statistics.median(result[key] for result in results)

    speed = median(ours, "tokens_per_second")
    theirs_speed = median(reference, "tokens_per_second")
    return {
        "unit": "tokens/s",
        "ours": speed,
        "reference": theirs_speed,
        "ratio": speed / theirs_speed,
        "dtype": dtype,
        "threads": threads,
        "same_tokens": all(result["same_tokens"] for result in ours),
        "time_to_first_token_s": median(ours, "time_to_first_token_s"),
        "reference_time_to_first_token_s": median(reference, "time_to_first_token_s"),
        "wire_bytes_per_token": round(wire),
        "holder_pss_MB": [round(value / 1e6) for value in memory],
        "idle_python_with_torch_pss_MB": round(baseline / 1e6),
        "runs": {
            "ours": [result["tokens_per_second"] for result in ours],
            "reference": [result["tokens_per_second"] for result in reference],
        },
    }


def _wire_bytes_per_token(model: torrentlm.Model, holders: list[Holder], tokens: int) -> float:
    """What one more token costs: the prompt's own bytes are in both terms of the difference."""

    def cost(count: int) -> int:
        before = sum(holder.wire_bytes() for holder in holders)
        model.generate(PROMPT, max_new_tokens=count)
        return sum(holder.wire_bytes() for holder in holders) - before

    return (cost(tokens + 1) - cost(1)) / tokens


class _Talker:
    """A process that is spoken to in lines of JSON."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the reference process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def __enter__(self) -> _Talker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _holders(folder: Path, recipe: Path, dtype: str, threads: int) -> Iterator[tuple[str, list[Holder]]]:
    with ExitStack() as stack:
        publisher = Holder(str(recipe), folder / "publisher", "--blocks", "none")
        stack.callback(publisher.end)
        magnet = publisher.wait_ready()["magnet"]
        how = ("--precision", dtype, "--threads", str(threads))
        holders = []
        for number, span in enumerate(SPANS):
            holder = Holder(magnet, folder / str(number), "--blocks", span, *how)
            stack.callback(holder.end)
            holders.append(holder)
        magnets = [holder.wait_ready()["magnet"] for holder in holders]
        publisher.end()
        yield magnets[0], holders


@contextmanager
def _idle_process() -> Iterator[int]:
    """What a Python process with torch and transformers imported takes by itself."""
    code = "import torch, transformers.models.llama.modeling_llama, sys; print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
