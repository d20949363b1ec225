from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
import trio

from torrentlm.compute.device import Device
from torrentlm.compute.threads import available_cores, prepare_environment
from torrentlm.errors import ConfigError, LocalProtocolError


async def in_trio_one_at_a_time() -> None:
    device = Device()
    running = most = 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        assert threading.current_thread() is not threading.main_thread()
        return number

    results: list[int] = []

    async def call(number: int) -> None:
        results.append(await device.run(work, number))

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(call, number)
    assert (sorted(results), most) == ([0, 1, 2, 3, 4], 1)


def test_one_forward_at_a_time_in_a_worker_thread() -> None:
    trio.run(in_trio_one_at_a_time)


def test_a_forward_is_not_left_half_way() -> None:
    done = threading.Event()

    async def main() -> None:
        device = Device()
        with trio.move_on_after(0.01) as scope:
            await device.run(lambda: (threading.Event().wait(0.1), done.set()))
        assert scope.cancelled_caught or done.is_set()

    trio.run(main)
    assert done.is_set()


def test_names() -> None:
    device = Device("cpu", threads=1)
    assert torch.get_num_threads() == 1
    assert device.name.startswith("cpu (") and "1 threads" in device.name
    for name in ("cuda:7", "no such thing"):
        with pytest.raises(ConfigError):
            Device(name)


def in_a_fresh_process(code: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "GOMP_"))}
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True, timeout=120
    )
    return run.stdout.strip()


def test_the_environment_is_set_before_torch_reads_it() -> None:
    code = (
        "from torrentlm.compute.threads import prepare_environment; prepare_environment({}); import os, sys;"
        "assert 'torch' not in sys.modules;"
        "print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT') is not None);"
        "import torch; print(torch.get_num_threads())"
    )
    assert in_a_fresh_process(code.format(1)) == "1 True\n1"
    assert in_a_fresh_process(code.format("")).startswith(f"{available_cores()} True")
    assert in_a_fresh_process(code.format(""), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive") == "1 False\n1"


HEAP = """
from torrentlm.compute.heap import give_large_back
{}
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def load():  # as blocks are made smaller: large for a moment, then a smaller copy that stays
    return [torch.ones(6 << 20, dtype=torch.int8).to(torch.float32).to(torch.int8)[: 1 << 16].clone() for _ in range(8)]
before = resident()
kept = [load() for _ in range(4)]
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_large_tensors_go_back_to_the_system() -> None:
    kept = int(in_a_fresh_process(HEAP.format("")))
    assert int(in_a_fresh_process(HEAP.format("assert give_large_back()"))) < 12 < kept
    code = "from torrentlm.compute.heap import give_large_back; print(give_large_back())"
    assert in_a_fresh_process(code, MALLOC_MMAP_THRESHOLD_="33554432") == "False"


def test_too_late_is_said() -> None:
    with pytest.raises(LocalProtocolError):
        prepare_environment()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system ties no thread to a core")
def test_compute_threads_have_a_core_each_and_other_threads_all() -> None:
    code = (
        "import os, threading; from torrentlm.compute.threads import first_import, prepare_environment\n"
        "prepare_environment()\n"
        "with first_import(): import torch\n"
        "every = os.sched_getaffinity(0)\n"
        "def cores():\n"
        "    return [os.sched_getaffinity(int(thread)) for thread in os.listdir('/proc/self/task')]\n"
        "def compute():\n"
        "    torch.ones(1 << 22).sum(); tied.extend(own for own in cores() if own != every)\n"
        "tied = []; thread = threading.Thread(target=compute); thread.start(); thread.join()\n"
        "print(len(every), torch.get_num_threads(), sorted(map(len, tied)) , len(set().union(*tied)))"
    )
    cpus = os.sched_getaffinity(0)
    cores = available_cores()
    tied = len(cpus) > 1  # on a single one there is nothing to choose
    siblings = len(cpus) // cores
    expected = f"{len(cpus)} {cores} {[siblings] * cores if tied else []} {len(cpus) if tied else 0}"
    assert in_a_fresh_process(code) == expected


def test_a_device_that_is_lost_says_so_and_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a driver that lost one: whatever is asked of it fails."""
    device, name = Device(), Device().name
    device.torch_device = torch.device("cuda:0")

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for asked in ("mem_get_info", "empty_cache", "get_device_name"):
        monkeypatch.setattr(torch.cuda, asked, lost)
    with pytest.raises(ConfigError, match="cuda:0 is not usable here, or not any more"):
        device.free_memory()
    device.give_back()
    assert device.name == name
