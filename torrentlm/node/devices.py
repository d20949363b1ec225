"""The devices that a node computes on, each with its budget. Importing this imports torch."""

from __future__ import annotations

import logging

from torrentlm.compute.device import Device
from torrentlm.compute.devices import DeviceInfo, choose, find_devices
from torrentlm.compute.measure import measured
from torrentlm.config import NodeConfig
from torrentlm.node.memory import device_budgets, offload_budgets, unused_offload

log = logging.getLogger(__name__)


def open_devices(config: NodeConfig) -> tuple[Device, ...]:
    """The devices of ``config.devices``, in that order, budgets from what is free now (``node/memory.py``).

    Blocks for a second or two where there are accelerators, and for some more where blocks are to be offloaded and
    their speed has not been measured before. Raises ConfigError for a device that is not there or does
    not work, and for a budget that is more than a device has.
    """
    chosen = choose(config.devices, find_devices())
    budgets, offloads = device_budgets(config, chosen), offload_budgets(config, chosen)
    if why := unused_offload(config, offloads):
        log.warning(why)
    return tuple(
        Device(info.name, config.threads, budget, offload, _upload(info, config) if offload else 0.0)
        for info, budget, offload in zip(chosen, budgets, offloads, strict=True)
    )


def _upload(info: DeviceInfo, config: NodeConfig) -> float:
    """Bytes per second from the processor's memory, locked if it can be."""
    [found] = measured([info], config.data, log.warning)
    return found.pinned or found.upload
