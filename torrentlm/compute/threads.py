"""Settings that torch reads when it is imported. Standard library only: call ``prepare_environment`` first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torrentlm.compute.heap import give_large_back
from torrentlm.errors import LocalProtocolError

SPIN_COUNT = 3_000
"""How long an idle OpenMP thread turns before it sleeps, in libgomp's unit (some 50 cycles): as long as the next layer
takes to come, and no longer, since the next holder may be another process on the same cores."""

_CPUS = Path("/sys/devices/system/cpu")


def available_cores() -> int:
    """Physical cores that this process may use: two forwards' threads on one core only get in each other's way."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        return len({Path(_CPUS, f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus})
    except OSError:
        return len(cpus)


def prepare_environment(threads: int | None = None) -> None:
    """Choose the number of compute threads (default: all cores), how idle ones wait, and when memory goes back to the
    system, where the environment does not.

    Must come before torch's first import in the process, since OpenMP reads its environment once: LocalProtocolError
    otherwise.
    """
    if "torch" in sys.modules:
        raise LocalProtocolError("the compute environment was prepared after torch had been imported")
    give_large_back()
    count = str(threads or available_cores())
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = count
    os.environ.setdefault("OMP_NUM_THREADS", count)
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if os.environ["OMP_NUM_THREADS"] == str(available_cores()):
        # A thread per core, each on its own: the kernel would put woken ones on one core together for milliseconds.
        # With fewer threads it is better placed to choose, among what else runs.
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("OMP_PLACES", "cores")


@contextmanager
def first_import() -> Iterator[None]:
    """Around an import that may be torch's first: OpenMP ties the importing thread, and all that this one starts, to
    one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
