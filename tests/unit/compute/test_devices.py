"""What is found of devices, and which of them a node takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torrentlm.compute import devices, machine
from torrentlm.compute.devices import DeviceInfo, choose, find_devices, processor, unused_hardware
from torrentlm.compute.processor import parse_cpuinfo, parse_instruction_sets
from torrentlm.errors import ConfigError

CPU = DeviceInfo("cpu", "cpu", "A processor", 8 << 30, 4 << 30)
GPUS = tuple(DeviceInfo(f"cuda:{n}", "cuda", "A GPU", 24 << 30, 20 << 30) for n in range(2))
BROKEN = DeviceInfo("cuda:2", "cuda", "An old GPU", 0, 0, problem="cuda:2 cannot be used: too old.")

X86 = """\
processor\t: 0
model name\t: Some Xeon
flags\t\t: fpu avx avx2 f16c avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\nCPU implementer\t: 0x41\n"


def test_instruction_sets() -> None:
    assert parse_instruction_sets(X86) == (
        *("AVX2", "F16C", "AVX512", "AVX512-BF16", "AVX512-VNNI"),
        *("AMX-BF16", "AMX-INT8"),
    )
    assert parse_instruction_sets(ARM) == ("NEON", "DOTPROD", "BF16", "I8MM", "SVE")
    assert parse_instruction_sets("") == ()
    assert parse_cpuinfo(X86)["model name"] == "Some Xeon"


def test_the_processor_needs_no_torch() -> None:
    script = (
        "import sys; from torrentlm.compute.devices import processor; found = processor();"
        "assert found.memory_total >= found.memory_free > 0 and found.units > 0 and found.model;"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "False"


def test_what_is_here() -> None:
    first, *others = find_devices()
    assert (
        first.name == "cpu"
        and not first.problem
        and replace(first, memory_free=0, memory_total=0) == replace(processor(), memory_free=0, memory_total=0)
    )
    assert all(device.accelerates for device in others)


def test_auto_takes_every_accelerator_that_works_else_the_processor() -> None:
    assert choose(None, (CPU, *GPUS, BROKEN)) == GPUS
    assert choose(None, (CPU, BROKEN)) == (CPU,)
    assert choose(None, (CPU,)) == (CPU,)


def test_named_ones_in_their_order() -> None:
    assert choose(("cuda:1", "cpu", "cuda:1"), (CPU, *GPUS)) == (GPUS[1], CPU)
    with pytest.raises(ConfigError, match=r"no device cuda:7 here; --devices can be auto, or name cpu and cuda:0 and"):
        choose(("cpu", "cuda:7"), (CPU, *GPUS))
    with pytest.raises(ConfigError, match="too old"):
        choose(("cuda:2",), (CPU, BROKEN))


def fake_torch(**changes: Any) -> Any:
    """What ``_gpu`` asks of torch, with a GPU that works unless ``changes`` say otherwise."""
    said = SimpleNamespace(
        name="A GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, gcnArchName="gfx1100:xnack-"
    )
    cuda = {"get_device_properties": lambda index: said, "mem_get_info": lambda index: (70 << 30, 79 << 30)}
    ones = changes.pop("ones", lambda *given, **named: torch.ones(2))
    version = SimpleNamespace(hip=changes.pop("hip", None), cuda="13.0")
    return SimpleNamespace(cuda=SimpleNamespace(**cuda | changes), version=version, ones=ones)


def fail(*given: object, **named: object) -> Any:
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


def test_a_gpu() -> None:
    found = devices._gpu(fake_torch(), 1)
    assert (found.name, found.backend, found.model, found.problem) == ("cuda:1", "cuda", "A GPU", "")
    assert (found.memory_free, found.memory_total, found.units, found.features) == (70 << 30, 79 << 30, 132, ("sm_90",))
    amd = devices._gpu(fake_torch(hip="6.4"), 0)
    assert (amd.name, amd.backend, amd.features) == ("cuda:0", "rocm", ("gfx1100",)) and "ROCm 6.4" in amd.driver


def test_a_gpu_that_torch_cannot_use_or_that_is_gone() -> None:
    old = devices._gpu(fake_torch(ones=fail), 0)
    assert (
        "cuda:0 (A GPU, sm_90) cannot be used: CUDA error: no kernel image" in old.problem and "DSA" not in old.problem
    )
    gone = devices._gpu(fake_torch(get_device_properties=fail), 3)
    assert gone.problem.startswith("cuda:3 does not answer") and gone.name == "cuda:3"
    full = devices._gpu(fake_torch(mem_get_info=fail), 0)
    assert full.problem and full.memory_total == 80 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_torch_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "driver for NVIDIA GPUs" in unused_hardware() and "built without CUDA" in unused_hardware()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds none" in unused_hardware() and "CUDA_VISIBLE_DEVICES" in unused_hardware()


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups in which this process seems to be in box/inner."""
    inner = tmp_path / "box" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    real = Path.read_text

    def read_text(path: Path, *given: Any, **named: Any) -> str:
        return "0::/box/inner\n" if str(path) == "/proc/self/cgroup" else real(path, *given, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    return inner


def limit(group: Path, most: str, used: int, inactive: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_a_container_has_no_more_memory_than_its_limit(cgroup: Path) -> None:
    machine_has = machine.total_memory()
    limit(cgroup, "max", 1000, 0)
    assert machine.total_memory() == machine_has
    limit(cgroup.parent, "100000000", 60_000_000, 20_000_000)
    assert machine.total_memory() == 100_000_000
    assert machine.available_memory() == 60_000_000
    limit(cgroup, "50000000", 60_000_000, 0)
    assert (machine.total_memory(), machine.available_memory()) == (50_000_000, 0)
