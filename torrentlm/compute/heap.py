"""How the C library hands out memory for tensors on the processor. Standard library only."""

from __future__ import annotations

import ctypes
import os

LARGE = 1 << 20
"""Bytes from which on a tensor has a mapping of its own, which goes back to the system as soon as nobody uses it."""

_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def give_large_back() -> bool:
    """Have glibc give freed tensors of ``LARGE`` bytes or more back to the system at once; False where this is not
    glibc, or where the environment chooses.

    By default it raises its threshold, to 32 MiB, as soon as one such tensor is freed, and keeps what comes later in
    a heap of each thread, with holes that go back to nobody: a holder that makes its blocks smaller as it loads
    them then takes twice what it has (``tools/bench memory --precision INT8``).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - others have a mallopt with other numbers, or none
        return bool(library.mallopt(_M_MMAP_THRESHOLD, LARGE))
    except (OSError, AttributeError, TypeError):
        return False
