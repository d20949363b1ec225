"""What this machine and its libraries are. Imports nothing heavy until asked about torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from torrentlm.manifest.sidecar import Libraries

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that the machine, or the container that this process is in, could give to a new program now."""
    free = _meminfo("MemAvailable")
    if free is None:
        free = total_memory() // 2
    return max(0, min([free, *(limit - used for limit, used in _limits())]))


def total_memory() -> int:
    """Bytes that the machine has, or fewer where a container's limit is lower."""
    total = _meminfo("MemTotal")
    if total is None:
        total = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([total, *(limit for limit, _ in _limits())])


def may_accelerate() -> bool:
    """Whether this machine could have an accelerator; which, and whether it works, torch has to be asked."""
    return sys.platform in ("darwin", "win32") or any(
        Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg")
    )


def _meminfo(name: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group (v2) above this process that has a limit. File pages that nobody
    has open count as used there; they are given up when asked for, so they do not here."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return
    path = next((line[3:] for line in own.splitlines() if line.startswith("0::")), None)
    if path is None:
        return
    folder = Path(_CGROUPS, path.strip("/"))
    for group in (folder, *folder.parents):
        if not group.is_relative_to(_CGROUPS):
            return
        try:
            limit = int(Path(group, "memory.max").read_text())
            used = int(Path(group, "memory.current").read_text())
            stat = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
            yield limit, max(0, used - int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue  # the word "max", or a group without this controller


def libraries() -> Libraries:
    """The versions that are installed here; imports torch."""
    import torch

    return Libraries(
        torch=version("torch"),
        transformers=version("transformers"),
        torrentlm=version("torrentlm"),
        processor=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    )
