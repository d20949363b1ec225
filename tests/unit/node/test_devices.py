"""The devices that a node takes, and how much of each."""

from __future__ import annotations

import pytest
import torch

from torrentlm.compute.devices import DeviceInfo, choose
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.node.devices import open_devices
from torrentlm.node.memory import CARD_SHARE, MACHINE_SHARE, device_budgets, offload_budgets, unused_offload

CPU = DeviceInfo("cpu", "cpu", "A processor", 8_000, 5_000)
GPUS = (
    DeviceInfo("cuda:0", "cuda", "A GPU", 24_000, 20_000),
    DeviceInfo("cuda:1", "cuda", "A small GPU", 8_000, 4_000),
)
APPLE = DeviceInfo("mps", "mps", "A GPU", 6_000, 5_000, unified=True)


def test_each_device_has_its_own_budget() -> None:
    free = device_budgets(NodeConfig(), (*GPUS, CPU))
    assert free == (int(20_000 * CARD_SHARE), int(4_000 * CARD_SHARE), int(5_000 * MACHINE_SHARE))
    assert device_budgets(NodeConfig(ram=1_000, vram=6_000), (CPU, *GPUS)) == (1_000, 6_000, 6_000)


def test_parts_of_the_processor_share_its_memory() -> None:
    parts = choose(("cpu:0", "cuda:1", "cpu:1"), (CPU, *GPUS))
    assert [part.name for part in parts] == ["cpu:0", "cuda:1", "cpu:1"]
    assert device_budgets(NodeConfig(ram=1_000, vram=2_000), parts) == (500, 2_000, 500)
    assert device_budgets(NodeConfig(), parts) == (1_500, int(4_000 * CARD_SHARE), 1_500)


def test_one_memory_is_not_given_twice() -> None:
    assert device_budgets(NodeConfig(), (APPLE,)) == (3_000,)
    assert sum(device_budgets(NodeConfig(), (APPLE, CPU))) == 3_000


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (NodeConfig(vram=9 * 10**9), r"cuda:1 has 0.0 MB of memory, less than the 9,000.0 MB of --vram; lower --vram"),
        (NodeConfig(ram=9 * 10**9), r"cpu has 0.0 MB of memory, less than the 9,000.0 MB of --ram; lower --ram"),
    ],
)
def test_a_budget_beyond_the_device(config: NodeConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        device_budgets(config, (CPU, GPUS[1]))


def test_ram_to_offload_to_is_shared_by_accelerators_with_memory_of_their_own() -> None:
    assert offload_budgets(NodeConfig(offload=1_001), (CPU, *GPUS)) == (0, 500, 500)
    assert offload_budgets(NodeConfig(), GPUS) == (0, 0)
    nobody = offload_budgets(NodeConfig(offload=1_000), (APPLE, CPU))
    assert nobody == (0, 0)
    assert unused_offload(NodeConfig(offload=1_000), nobody).startswith("--offload does nothing here: it is for")
    assert unused_offload(NodeConfig(), nobody) == unused_offload(NodeConfig(offload=1), (0, 1)) == ""
    with pytest.raises(ConfigError, match=r"of memory, less than the .* of --offload; lower --offload"):
        offload_budgets(NodeConfig(offload=1 << 62), GPUS)


def test_open_devices() -> None:
    [device] = open_devices(NodeConfig(devices=("cpu",), ram=1 << 20))
    assert (device.torch_device, device.budget) == (torch.device("cpu"), 1 << 20)
    device.check()
    first, second = open_devices(NodeConfig(devices=("cpu:0", "cpu:1"), ram=1 << 20))
    assert (first.label, second.label) == ("cpu:0", "cpu:1")
    assert {first.torch_device, second.torch_device} == {torch.ones(1, device=second.torch_device).device}
    assert first.budget == second.budget == 1 << 19
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"no device cuda:0 here; --devices can be auto, or name cpu"):
            open_devices(NodeConfig(devices=("cuda:0",)))
