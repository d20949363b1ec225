"""What this machine and its libraries are. Imports nothing heavy until asked about torch."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from torrentlm.manifest.sidecar import Libraries


def available_memory() -> int:
    """Bytes that the machine could give to a new program now."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 2


def libraries() -> Libraries:
    """The versions that are installed here; imports torch."""
    import torch

    return Libraries(
        torch=version("torch"),
        transformers=version("transformers"),
        torrentlm=version("torrentlm"),
        processor=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    )
