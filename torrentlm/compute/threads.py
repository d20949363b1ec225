"""Settings that torch reads when it is imported. Standard library only: call this first."""

from __future__ import annotations

import os
import sys

from torrentlm.errors import LocalProtocolError

SPIN_COUNT = 200_000
"""How long an idle OpenMP thread turns before it sleeps, in libgomp's unit (PAUSE instructions and the like)."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_environment(threads: int | None = None) -> None:
    """Choose the number of compute threads (default: all cores) and how idle ones wait, where the environment does not.

    Must come before torch's first import in the process, since OpenMP reads its environment once: LocalProtocolError
    otherwise.
    """
    if "torch" in sys.modules:
        raise LocalProtocolError("the compute environment was prepared after torch had been imported")
    count = str(threads or available_cores())
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = count
    os.environ.setdefault("OMP_NUM_THREADS", count)
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
