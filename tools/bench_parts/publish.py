"""`torrentlm publish` of a sharded bf16 checkpoint of a 7B model's shape, MB/s of its bytes, the start included.

The reference is what nobody who publishes can do without, in one plain loop: read the bytes once, compute the SHA-1
pieces and the SHA-256 tree of hybrid torrents, write them once, fsync. The two take turns, each with a cold cache for
what it reads. Peak memory is watched from outside, as PSS; its bound is two largest blocks and 500 MB. Beside it, in
seconds: publishing SmolLM2-135M-Instruct, against transformers' loading it and a loop that reads and hashes the same
bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _big import make_checkpoint
from _holder import pss_of

from torrentlm.cli.demo import find_recipe
from torrentlm.config import load
from torrentlm.manifest.torrent import Hasher, piece_length
from torrentlm.publish.source import locate

ALLOWED = 500_000_000  # bytes beside two blocks
CHUNK = 4 * 1024 * 1024
WATCH_EVERY_S = 0.02
LOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
gguf = Path(sys.argv[1])
AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
"""


@dataclass(frozen=True)
class Run:
    """One `torrentlm publish`. ``streaming_s``: from the first bytes to the last; ``peak``: bytes of PSS.

    ``largest``: bytes of the largest block file; this model's blocks have one each.
    """

    seconds: float
    streaming_s: float
    peak: int
    largest: int


def run(runs: int, gigabytes: float = 2.0, folder: str = "") -> dict[str, Any]:
    """A checkpoint of about ``gigabytes`` (14 for a whole 7B model) in a new folder below ``folder`` (the system's for
    temporary files); takes twice its size of disk there.
    """
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="torrentlm-bench-", dir=folder or None) as place:
        source = Path(place, "checkpoint")
        size = make_checkpoint(source, int(gigabytes * 1e9))
        recipe = Path(place, "model.toml")
        recipe.write_text(f'[model]\nname = "Big"\ntokenizer = false\n\n[model.source]\nfolder = "{source}"\n')
        files = sorted(source.glob("*.safetensors"))
        ours: list[Run] = []
        reference: list[float] = []
        for _ in range(runs):
            ours.append(publish(recipe, Path(place, "data"), files))
            reference.append(copy_and_hash(files, Path(place, "copy")))
        small = smollm2(runs, Path(place, "small"))

    def speeds(times: list[float]) -> list[float]:
        return [size / 1e6 / seconds for seconds in times]

    mine, theirs = speeds([each.seconds for each in ours]), speeds(reference)
    largest = ours[0].largest
    peak = max(each.peak for each in ours)
    return {
        "unit": "MB/s",
        "ours": statistics.median(mine),
        "reference": statistics.median(theirs),
        "ratio": statistics.median(mine) / statistics.median(theirs),
        "runs": {"ours": mine, "reference": theirs},
        "bytes": size,
        "streaming_MB_per_s": statistics.median(speeds([each.streaming_s for each in ours])),
        "peak_pss_MB": peak / 1e6,
        "bound_MB": (2 * largest + ALLOWED) / 1e6,
        "within_bound": peak <= 2 * largest + ALLOWED,
        "largest_block_MB": largest / 1e6,
        "smollm2": small,
    }


def publish(recipe: Path, data: Path, sources: Sequence[Path], keep: bool = False) -> Run:
    """Publish ``recipe`` into ``data``, which is removed afterwards unless it is to be kept."""
    forget(sources)
    command = [sys.executable, "-m", "torrentlm", "publish", str(recipe), "--data", str(data), "--json"]
    began = time.perf_counter()
    moments = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watcher = _Watcher(process.pid)
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and event["done"]:
                moments.append(time.perf_counter())
        process.wait()
        seconds = time.perf_counter() - began
        watcher.join()
    if process.returncode:
        raise RuntimeError("publishing failed")
    largest = max(path.stat().st_size for path in (data / "blocks").iterdir())
    if not keep:
        shutil.rmtree(data)
    return Run(seconds, moments[-1] - moments[0], watcher.peak, largest)


class _Watcher(threading.Thread):
    """Looks at a process's PSS until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.peak = 0

    def run(self) -> None:
        while True:
            try:
                self.peak = max(self.peak, pss_of(self._pid))
            except (OSError, RuntimeError):
                return
            time.sleep(WATCH_EVERY_S)


def copy_and_hash(sources: Sequence[Path], target: Path) -> float:
    """Seconds that a plain loop takes to read, hash and write these files once."""
    forget(sources)
    target.mkdir()
    began = time.perf_counter()
    for path in sources:
        with Path(target, path.name).open("wb", buffering=0) as file:
            for chunk in read_and_hash(path):
                file.write(chunk)
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def read_and_hash(path: Path) -> Iterable[memoryview]:
    hasher = Hasher(piece_length(path.stat().st_size))
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            yield buffer[:count]
    hasher.finish()


def smollm2(runs: int, place: Path) -> dict[str, Any]:
    """Seconds: publishing the small model, and what everybody pays who loads it and hashes its published bytes."""
    recipe = find_recipe()
    gguf = locate(load(recipe).recipe).path  # type: ignore[arg-type]
    ours, loading, hashing = [], [], []
    for _ in range(runs):
        ours.append(publish(recipe, place, [gguf], keep=True).seconds)
        forget([gguf])
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", LOAD, str(gguf)], check=True, capture_output=True)
        loading.append(time.perf_counter() - began)
        blocks = sorted((place / "blocks").iterdir())
        forget(blocks)
        began = time.perf_counter()
        for path in blocks:
            for chunk in read_and_hash(path):
                del chunk
        hashing.append(time.perf_counter() - began)
        shutil.rmtree(place)
    mine = statistics.median(ours)
    theirs = statistics.median(load + hash_ for load, hash_ in zip(loading, hashing, strict=True))
    return {
        "ours_s": mine,
        "reference_s": theirs,
        "ratio": mine / theirs,
        "load_s": statistics.median(loading),
        "hash_s": statistics.median(hashing),
    }


def forget(paths: Iterable[Path]) -> None:
    """Take files out of the page cache, as they are for who publishes what was fetched yesterday."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
