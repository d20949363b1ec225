"""How much memory a node may use, from its settings and the machine, and how much blocks take.

``ram`` is the budget of the processor, ``vram`` that of each accelerator, ``offload`` what of the processor's memory
accelerators may use beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torrentlm.compute.devices import DeviceInfo
from torrentlm.compute.machine import available_memory, total_memory
from torrentlm.compute.precision import bytes_as, file_forms, packed_bytes
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.manifest.adapter import AdapterManifest
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Span

WEIGHTS_SHARE = 0.75
"""Of the memory budget; the rest is for KV-caches."""
MACHINE_SHARE = 0.6
"""Of the memory that is available at the start, where no budget is configured."""
CARD_SHARE = 0.85
"""The same of an accelerator's own memory: nobody else wants it, but products need room for what they make."""


def budget(config: NodeConfig) -> int:
    """Of the processor's memory."""
    return int(available_memory() * MACHINE_SHARE) if config.ram is None else config.ram


def weights_budget(config: NodeConfig) -> int:
    return weights_share(budget(config))


def weights_share(budget: int) -> int:
    """What of a device's budget is for weights; the rest is for KV-caches."""
    return int(budget * WEIGHTS_SHARE)


def offloadable(manifest: Manifest, in_memory: Mapping[str, int], span: Span) -> dict[int, int]:
    """The blocks of ``span`` that may stay in RAM, and the bytes that each takes then: blocks of layers with one file,
    that no other block has. ``in_memory``: as ``weights_bytes`` has it."""
    users = Counter(file.name for block in range(len(manifest.blocks)) for file in manifest.block_files(block))
    found = {}
    for block in span:
        files = manifest.block_files(block)
        if manifest.blocks[block].kind == "layers" and len(files) == 1 and users[files[0].name] == 1:
            found[block] = packed_bytes(in_memory[files[0].name], len(manifest.layouts[files[0].layout].specs))
    return found


def weights_bytes(
    manifest: Manifest | AdapterManifest, dtype: str, stored: Mapping[int, str] | None = None
) -> dict[str, int]:
    """What each file takes in memory when ``dtype`` is computed in, in bytes, by the file's name.

    ``stored`` are the blocks that are kept in INT8 or INT4. Weights that need no conversion are mapped, not
    copied. They count all the same: every step reads all of them, so their pages have to stay.
    """
    forms = file_forms(manifest, stored) if stored and isinstance(manifest, Manifest) else {}
    known: dict[tuple[int, str | None], int] = {}
    for file in manifest.files:
        layout, form = file.layout, forms.get(file.name)
        if (layout, form) not in known:
            known[layout, form] = sum(bytes_as(spec, dtype, form) for spec in manifest.layouts[layout].specs)
    return {file.name: known[file.layout, forms.get(file.name)] for file in manifest.files}


def device_budgets(config: NodeConfig, devices: Sequence[DeviceInfo]) -> tuple[int, ...]:
    """What a node takes of each device's memory, in bytes: ``ram`` of the processor's, ``vram`` of each accelerator's.

    Devices that share the processor's memory share what is free of it, too, and parts of the processor share ``ram``.
    Raises ConfigError where a configured budget is more than the device has.
    """
    sharing = sum(1 for device in devices if device.unified or not device.accelerates)
    processors = sum(1 for device in devices if not device.accelerates)
    return tuple(_device_budget(config, device, sharing, processors) for device in devices)


def offload_budgets(config: NodeConfig, devices: Sequence[DeviceInfo]) -> tuple[int, ...]:
    """What of the processor's memory each device may use for blocks that it has no room for, in bytes.

    Only accelerators with a memory of their own gain by it. Raises ConfigError where ``offload`` is more than there is.
    """
    gains = [device.accelerates and not device.unified for device in devices]
    if config.offload > total_memory():
        raise ConfigError(
            f"This machine has {total_memory() / 1e6:,.1f} MB of memory, less than the {config.offload / 1e6:,.1f} MB"
            " of --offload; lower --offload, or leave it out."
        )
    share = config.offload // max(1, sum(gains))
    return tuple(share if gain else 0 for gain in gains)


def unused_offload(config: NodeConfig, budgets: Sequence[int]) -> str:
    """A sentence where ``offload`` is set and no device of ``offload_budgets`` gains by it; else ""."""
    if not config.offload or any(budgets):
        return ""
    return (
        "--offload does nothing here: it is for accelerators that have memory of their own, and this node computes on"
        " none; leave it out, or choose one with --devices."
    )


def _device_budget(config: NodeConfig, device: DeviceInfo, sharing: int, processors: int) -> int:
    name, given = ("vram", config.vram) if device.accelerates else ("ram", config.ram)
    if given is None:
        own = device.accelerates and not device.unified
        return int(device.memory_free * CARD_SHARE) if own else int(device.memory_free * MACHINE_SHARE) // sharing
    if given > device.memory_total:
        raise ConfigError(
            f"{device.name} has {device.memory_total / 1e6:,.1f} MB of memory, less than the {given / 1e6:,.1f} MB of"
            f" --{name}; lower --{name}, or leave it out for what is free."
        )
    return given if device.accelerates else given // processors
