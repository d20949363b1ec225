"""The devices that a node computes on, each with its budget. Importing this imports torch."""

from __future__ import annotations

from torrentlm.compute.device import Device
from torrentlm.compute.devices import choose, find_devices
from torrentlm.config import NodeConfig
from torrentlm.node.memory import device_budgets


def open_devices(config: NodeConfig) -> tuple[Device, ...]:
    """The devices of ``config.devices``, in that order, budgets from what is free now (``node/memory.py``).

    Blocks for a second or two where there are accelerators. Raises ConfigError for a device that is not there or does
    not work, and for a budget that is more than a device has.
    """
    chosen = choose(config.devices, find_devices())
    budgets = device_budgets(config, chosen)
    return tuple(Device(info.name, config.threads, budget) for info, budget in zip(chosen, budgets, strict=True))
