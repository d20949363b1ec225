"""The devices that a node takes, and how much of each."""

from __future__ import annotations

import pytest
import torch

from torrentlm.compute.devices import DeviceInfo
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.node.devices import open_devices
from torrentlm.node.memory import CARD_SHARE, MACHINE_SHARE, device_budgets

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


def test_open_devices() -> None:
    [device] = open_devices(NodeConfig(devices=("cpu",), ram=1 << 20))
    assert (device.torch_device, device.budget) == (torch.device("cpu"), 1 << 20)
    device.check()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"no device cuda:0 here; --devices can be auto, or name cpu"):
            open_devices(NodeConfig(devices=("cuda:0",)))
