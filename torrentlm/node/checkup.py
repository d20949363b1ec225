"""What ``torrentlm doctor`` finds out: the machine, its devices and what they cost, the data folder, the network here.

Every part is plain values for a table or a script, and sentences about what is wrong, each with what to do. Nothing
beyond loopback is contacted.
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from torrentlm.compute.costs import Measurement
from torrentlm.compute.devices import DeviceInfo, choose, find_devices, unused_hardware, whole
from torrentlm.compute.threads import first_import
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError, FolderInUseError, NetworkError, StorageError
from torrentlm.gateway.ports import open_ports
from torrentlm.node.memory import WEIGHTS_SHARE, device_budgets, offload_budgets, unused_offload
from torrentlm.swarm.store import Store

LITTLE_DISK = 1 << 30
LITTLE_MEMORY = 256 << 20
"""Less than this is hardly a block of any model."""
_PATIENCE_S = 2.0
_PACKAGE = "torrentlm"

Facts = dict[str, Any]


def examine(config: NodeConfig, *, again: bool = False, say: Callable[[str], None] = lambda doing: None) -> Facts:
    """All of it, as docs/cli.md lists it; ``faults`` are the sentences. Imports torch, and takes seconds where devices
    have to be measured; ``say`` hears what is being done. ``again``: measure whatever is remembered."""
    faults: list[str] = []
    libraries = _libraries()
    faults += library_faults(requires(_PACKAGE) or (), libraries)
    data = _data_folder(config, faults)
    network = _network(config, in_use=data["in_use"], faults=faults)
    say("Looking for devices …")
    with first_import():  # ties this thread to one core until it is done
        from torrentlm.compute.measure import measured
    found = find_devices()
    faults += filter(None, [unused_hardware()])
    say("Measuring the devices …")
    measurements: dict[str, Measurement] = {}
    for device in found:
        try:
            done = measured([device], config.data, faults.append, again=again)
            measurements.update((one.device, one) for one in done)
        except ConfigError as error:
            faults.append(str(error))
    devices = _devices(config, found, measurements, faults)
    return {
        "libraries": libraries,
        "devices": devices,
        "data": data,
        "network": network,
        "faults": list(dict.fromkeys(faults)),
    }


# Libraries


def _libraries() -> dict[str, str]:
    """Python's version, ours, and that of every package that we require; "" for one that is not installed."""
    found = {"python": platform.python_version(), _PACKAGE: version(_PACKAGE)}
    for name in _lowest(requires(_PACKAGE) or ()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def library_faults(requirements: Sequence[str], found: Mapping[str, str]) -> list[str]:
    """A sentence for each library that is missing or older than the requirements (``name>=1.2``) say."""
    faults = []
    for name, lowest in _lowest(requirements).items():
        if not found.get(name):
            faults.append(f"The library {name} is not installed; run pip install '{name}>={lowest}'.")
        elif _numbers(found[name]) < _numbers(lowest):
            faults.append(
                f"The library {name} {found[name]} is older than {lowest}; run pip install '{name}>={lowest}'."
            )
    return faults


def _lowest(requirements: Sequence[str]) -> dict[str, str]:
    """Those without a marker: an extra's packages are not required."""
    matches = (re.fullmatch(r"([\w.-]+)\s*>=\s*([\d.]+)", line.strip()) for line in requirements)
    return {match[1]: match[2] for match in matches if match}


def _numbers(text: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, leading[0].split("."))) if leading else ()


# The data folder and the network


def _data_folder(config: NodeConfig, faults: list[str]) -> Facts:
    in_use = usable = False
    try:
        with Store(config.data):
            usable = True
    except FolderInUseError:
        in_use = usable = True  # by a node of ours: nothing is wrong with that
    except StorageError as error:
        faults.append(f"{str(error).rstrip('.')}.")
    free = _free(config.data)
    faults += disk_faults(config, free)
    return {"folder": str(config.data), "usable": usable, "in_use": in_use, "free": free, "budget": config.disk}


def _free(folder: Path) -> int:
    """Bytes free where the folder is or would be."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0


def disk_faults(config: NodeConfig, free: int) -> list[str]:
    """Sentences about a disk with ``free`` bytes."""
    if config.disk is not None and config.disk > free:
        return [
            f"The disk of {config.data} has {free / 1e6:,.1f} MB free, less than the {config.disk / 1e6:,.1f} MB of"
            " --disk; lower it."
        ]
    if free < LITTLE_DISK:
        return [
            f"The disk of {config.data} has only {free / 1e6:,.1f} MB free; make room, or choose a folder on"
            " another with --data."
        ]
    return []


def _network(config: NodeConfig, *, in_use: bool, faults: list[str]) -> Facts:
    found: Facts = {"host": config.host, "port": config.port}
    try:
        open_ports(config.host, config.port).close()
        found["port_free"] = True
    except NetworkError as error:
        found["port_free"] = False
        if not in_use:
            faults.append(str(error))
    for kind, carries in (("tcp", _tcp_works), ("udp", _udp_works)):
        try:
            carries()
            found[f"{kind}_loopback"] = True
        except OSError as error:
            found[f"{kind}_loopback"] = False
            faults.append(
                f"{kind.upper()} does not work on 127.0.0.1 ({(error.strerror or str(error)).lower()}); a node needs it"
                " to talk to libtorrent: see what a firewall or a sandbox forbids."
            )
    return found


def _udp_works() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
    ):
        there.bind(("127.0.0.1", 0))
        there.settimeout(_PATIENCE_S)
        here.sendto(b"?", there.getsockname())
        there.recvfrom(1)


def _tcp_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_PATIENCE_S)
        with socket.create_connection(listener.getsockname(), timeout=_PATIENCE_S):
            listener.accept()[0].close()


# Devices


def _devices(
    config: NodeConfig, found: Sequence[DeviceInfo], measurements: Mapping[str, Measurement], faults: list[str]
) -> list[Facts]:
    """Every device or chosen part of one, with its measurement and, if the node would use it, its budgets."""
    budgets: dict[str, int] = {}
    chosen: Sequence[DeviceInfo] = ()
    try:
        chosen = choose(config.devices, found)
        budgets = dict(zip((device.name for device in chosen), device_budgets(config, chosen), strict=True))
        if why := unused_offload(config, offload_budgets(config, chosen)):
            faults.append(why)
    except ConfigError as error:
        faults.append(str(error))
    faults += device_faults(config, found, budgets, measurements)
    parts = {device.name: [part for part in chosen if whole(part.name) == device.name] or [device] for device in found}
    return [
        _described(part, budgets.get(part.name), measurements.get(device.name))
        for device in found
        for part in parts[device.name]
    ]


def _described(device: DeviceInfo, budget: int | None, measurement: Measurement | None) -> Facts:
    described = asdict(device) | {"used": budget is not None, "budget": budget}
    if budget is not None:
        described["weights_budget"] = int(budget * WEIGHTS_SHARE)
        described["kv_budget"] = budget - described["weights_budget"]
    return described | {"measured": None if measurement is None else asdict(measurement)}


def device_faults(
    config: NodeConfig,
    found: Sequence[DeviceInfo],
    budgets: Mapping[str, int],
    measurements: Mapping[str, Measurement],
) -> list[str]:
    """Sentences about devices that cannot be used, budgets that hold no block, and a precision that is lacking."""
    faults = [device.problem for device in found if device.problem]
    for name, budget in budgets.items():
        if budget < LITTLE_MEMORY:
            faults.append(
                f"The budget of {name} is only {budget / 1e6:,.1f} MB, hardly a block of any model; close other"
                " programs, or raise --ram or --vram."
            )
        if whole(name) in measurements:
            named = [("precision", config.precision)] if config.precision != "auto" else []
            named += [("precision-of", precision) for _, precision in config.precision_of]
            costs = [(option, precision, measurements[whole(name)].cost(precision)) for option, precision in named]
            faults += [f"--{option} {precision}: {cost.lacking}" for option, precision, cost in costs if cost.lacking]
    return faults
