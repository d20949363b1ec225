"""A process started by another torrentlm process ends with it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

VARIABLE = "TORRENTLM_PARENT"
"""Set by the parent to its own process id; the child takes it out, so that it does not go further down."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """If a parent asked for it, have the kernel kill this process when that parent is gone (Linux; elsewhere nothing).

    Called first thing. A parent that died before is noticed by the process id, which has changed then.
    """
    parent = os.environ.pop(VARIABLE, "")
    if not parent:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != parent:
        raise SystemExit(1)
