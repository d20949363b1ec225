"""Needs a GPU. What a node would take of it, what it measures there, and what blocks really take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu.decoder import MIDDLE, PROMPT, Decoder, hidden
from torrentlm.compute.border import DTYPES
from torrentlm.compute.devices import find_devices
from torrentlm.compute.measure import measured
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.node.devices import open_devices
from torrentlm.node.memory import weights_bytes

SLACK = 4 << 20
"""torch hands memory out in pieces of 2 MiB."""


def test_it_is_found_and_measured(device: torch.device, tmp_path: Path, row: Callable[..., None]) -> None:
    [info] = [info for info in find_devices() if info.name == str(device)]
    assert info.problem == "" and 0 < info.memory_free <= info.memory_total and info.model
    [measurement] = measured([info], tmp_path, pytest.fail)
    assert measured([info], tmp_path, pytest.fail) == (measurement,)
    assert not measurement.cost("F32").lacking
    for cost in measurement.precisions:
        if not cost.lacking:
            row(cost.precision, GB_s=cost.decode * cost.bytes_per_weight / 1e9, TFLOP_s=2 * cost.prompt / 1e12)


def test_its_budget(device: torch.device) -> None:
    [opened] = open_devices(NodeConfig(devices=(str(device),)))
    assert opened.torch_device == device and opened.budget > 0
    if device.type == "cuda":
        assert opened.budget < torch.cuda.mem_get_info(device)[1]
        assert open_devices(NodeConfig(devices=(str(device),), vram=1 << 28))[0].budget == 1 << 28
        with pytest.raises(ConfigError, match="lower --vram"):
            open_devices(NodeConfig(devices=(str(device),), vram=1 << 50))


@pytest.mark.parametrize("precision", ["F32", "F16"])
def test_blocks_take_what_was_planned(
    precision: str, decoder: Decoder, cuda: torch.device, row: Callable[..., None]
) -> None:
    manifest = decoder.published.manifest
    planned = weights_bytes(manifest, precision)
    due = sum(planned[file.name] for file in manifest.span_files(MIDDLE.first, MIDDLE.last))
    gc.collect()
    before = torch.cuda.memory_allocated(cuda)
    held = decoder.held(precision, cuda, MIDDLE)
    runner = held.runner(MIDDLE)
    taken = torch.cuda.memory_allocated(cuda) - before
    row(precision, MB=taken / 1e6, planned_MB=due / 1e6)
    assert due <= taken <= due + SLACK
    cache = runner.open(1, 256)
    full = torch.cuda.memory_allocated(cuda)
    runner.forward(cache, hidden(runner, PROMPT), PROMPT)
    assert torch.cuda.memory_allocated(cuda) - full <= runner.cache_bytes(1, 256) + SLACK
    assert runner.dtype == DTYPES[precision]
    del held, runner, cache
    gc.collect()
    assert torch.cuda.memory_allocated(cuda) <= before + SLACK


def test_no_memory_left_is_a_sentence(cuda: torch.device, decoder: Decoder, tmp_path: Path) -> None:
    """A card that another program has filled: measuring says so instead of dying."""
    total = torch.cuda.mem_get_info(cuda)[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + (8 << 20)) / total, cuda)
    try:
        [info] = [info for info in find_devices() if info.name == str(cuda)]
        with pytest.raises(ConfigError, match="close what else uses it"):
            measured([info], tmp_path, pytest.fail)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
