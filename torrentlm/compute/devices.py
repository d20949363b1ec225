"""Which devices could compute here, as plain values: the processor, and what torch finds besides.

Importing this imports no torch; ``processor`` needs none. Names are torch's: AMD's GPUs are ``cuda:N`` there, too, and
their backend is ``rocm``.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torrentlm.compute.machine import available_memory, total_memory
from torrentlm.compute.processor import instruction_sets, processor_name
from torrentlm.compute.threads import available_cores
from torrentlm.errors import ConfigError

MAX_DEVICES = 64


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device. ``name`` is torch's ("cpu", "cuda:0", "mps"), ``model`` its maker's, memory in bytes.

    ``units`` are a processor's cores that this process may use, a GPU's multiprocessors (0: unknown). ``features`` are
    a processor's instruction sets, or a GPU's architecture ("sm_90", "gfx1100"). ``unified``: its memory is the
    processor's. ``problem`` is a sentence that says why it cannot be used, "" if it can.
    """

    name: str
    backend: str
    model: str
    memory_total: int
    memory_free: int
    units: int = 0
    features: tuple[str, ...] = ()
    driver: str = ""
    unified: bool = False
    problem: str = ""

    @property
    def accelerates(self) -> bool:
        return self.backend != "cpu"


def processor() -> DeviceInfo:
    """The processor, with the memory that this process could have."""
    return DeviceInfo(
        name="cpu",
        backend="cpu",
        model=processor_name(),
        memory_total=total_memory(),
        memory_free=available_memory(),
        units=available_cores(),
        features=instruction_sets(),
        driver=platform.machine(),
    )


def find_devices() -> tuple[DeviceInfo, ...]:
    """The processor first, then every accelerator, those that cannot be used too. Imports torch.

    Asking a GPU for its free memory makes torch set it up, which takes a second and some hundred MB of its memory.
    """
    import torch

    found = [processor()]
    if torch.cuda.is_available():
        found += [_gpu(torch, index) for index in range(min(torch.cuda.device_count(), MAX_DEVICES))]
    if torch.backends.mps.is_available():
        found.append(_mps(torch))
    return tuple(found)


def choose(names: Sequence[str] | None, found: Sequence[DeviceInfo]) -> tuple[DeviceInfo, ...]:
    """The devices of these names, in their order; None: all accelerators that can be used, the processor without any.

    ``cpu:N`` is a part of the processor, which is then several devices. Raises ConfigError for a device that is not
    there or cannot be used.
    """
    usable = [device for device in found if not device.problem]
    if names is None:
        fast = tuple(device for device in usable if device.accelerates)
        return fast or tuple(device for device in usable if not device.accelerates)[:1]
    by_name = {device.name: device for device in found}
    chosen = []
    for name in dict.fromkeys(names):
        device = by_name.get(whole(name))
        if device is None:
            here = " and ".join(known.name for known in usable)
            raise ConfigError(f"There is no device {name} here; --devices can be auto, or name {here}.")
        if device.problem:
            raise ConfigError(device.problem)
        chosen.append(replace(device, name=name))
    return tuple(chosen)


def whole(name: str) -> str:
    """The device that one of this name is, or is a part of."""
    return "cpu" if name.startswith("cpu:") else name


def unused_hardware() -> str:
    """A sentence about a GPU in this machine that torch does not see, "" if there is none. Imports torch."""
    import torch

    if torch.cuda.is_available():
        return ""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    for maker, library, there, built in (
        ("NVIDIA", "CUDA", nvidia, torch.version.cuda),
        ("AMD", "ROCm", Path("/dev/kfd").exists(), torch.version.hip),
    ):
        if not there:
            continue
        if built is None:
            return (
                f"This machine has a driver for {maker} GPUs, but torch {torch.__version__} is built without {library};"
                " install the torch that https://pytorch.org/get-started/locally names for it."
            )
        return (
            f"This machine has a driver for {maker} GPUs, but torch {torch.__version__} finds none ({_why_not(torch)});"
            " check the driver, and CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES if they are set."
        )
    return ""


def _why_not(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "it counts no device"


def _gpu(torch: Any, index: int) -> DeviceInfo:
    name = f"cuda:{index}"
    rocm = torch.version.hip is not None
    backend = "rocm" if rocm else "cuda"
    try:
        said = torch.cuda.get_device_properties(index)
        free, total, problem = 0, int(said.total_memory), ""
        architecture = said.gcnArchName.partition(":")[0] if rocm else f"sm_{said.major}{said.minor}"
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(2, device=name).sum().item()  # a GPU that torch's build has no code for fails here
        except RuntimeError as error:
            problem = (
                f"{name} ({said.name}, {architecture}) cannot be used: {_first_line(error)}. Another build of torch or"
                " another driver may help; --devices leaves it out."
            )
        return DeviceInfo(
            name=name,
            backend=backend,
            model=said.name,
            memory_total=total,
            memory_free=free,
            units=said.multi_processor_count,
            features=(architecture,),
            driver=_gpu_driver(torch, rocm),
            unified=bool(getattr(said, "is_integrated", False)),
            problem=problem,
        )
    except (RuntimeError, AssertionError) as error:
        lost = f"{name} does not answer: {_first_line(error)}. Check the driver, or leave it out with --devices."
        return DeviceInfo(name, backend, "unknown", 0, 0, problem=lost)


def _gpu_driver(torch: Any, rocm: bool) -> str:
    """The driver's version and that of the libraries torch was built with."""
    path = Path("/sys/module/amdgpu/version" if rocm else "/proc/driver/nvidia/version")
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", path.read_text(encoding="ascii", errors="replace"))
    except OSError:
        found = None
    built = f"ROCm {torch.version.hip}" if rocm else f"CUDA {torch.version.cuda}"
    return f"driver {found[0] if found else 'unknown'}, {built}"


def _mps(torch: Any) -> DeviceInfo:
    total, free, problem = total_memory(), 0, ""
    try:
        total = min(total, int(torch.mps.recommended_max_memory()))
        free = max(0, min(total - int(torch.mps.driver_allocated_memory()), available_memory()))
        torch.ones(2, device="mps").sum().item()
    except RuntimeError as error:
        problem = f"mps cannot be used: {_first_line(error)}. Update macOS or torch, or use --devices cpu."
    return DeviceInfo(
        name="mps",
        backend="mps",
        model=f"{processor_name()} GPU",
        memory_total=total,
        memory_free=free,
        driver=f"macOS {platform.mac_ver()[0]}",
        unified=True,
        problem=problem,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
