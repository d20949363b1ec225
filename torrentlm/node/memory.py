"""How much memory a node may use, from its settings and the machine.

The budget ``vram`` is for an accelerator's memory; blocks are computed on the processor, and it decides nothing here.
"""

from __future__ import annotations

import os
from pathlib import Path

from torrentlm.config import NodeConfig

WEIGHTS_SHARE = 0.75
"""Of the memory budget; the rest is for KV-caches."""
MACHINE_SHARE = 0.6
"""Of the memory that is available at the start, where no budget is configured."""


def available() -> int:
    """Bytes that the machine could give to a new program now."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) // 2


def budget(config: NodeConfig) -> int:
    return int(available() * MACHINE_SHARE) if config.ram is None else config.ram


def weights_budget(config: NodeConfig) -> int:
    return int(budget(config) * WEIGHTS_SHARE)


def kv_budget(config: NodeConfig) -> int:
    return budget(config) - weights_budget(config)
