"""Needs a GPU. A node that computes on it and on the processor: borders go from one to the other."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.swarm.nodes import in_trio
from tests.swarm.test_devices import PROMPT, two_devices
from torrentlm.client.generation import Options
from torrentlm.node.computing import Computing

LITTLE = 500_000
"""Bytes for weights: not all of the model."""


def test_the_processor_helps_out(device: torch.device, tmp_path: Path) -> None:
    devices = (str(device), "cpu") if device.type != "cpu" else ("cpu:0", "cpu:1")

    def shrink(computing: Computing) -> None:
        computing.lanes[0].memory.budget = LITTLE
        if device.type == "cpu":  # nobody helps then: they share
            computing.lanes[1].memory.budget = LITTLE

    @in_trio(240)
    async def body() -> None:
        async with two_devices(tmp_path, prepare=shrink, devices=devices) as scene, scene.client() as client:
            assert [lane.device.label for lane in scene.computing.lanes] == list(devices)
            assert len(scene.spans) == 2
            result = await client.model.generate(PROMPT, Options(max_new_tokens=24))
            assert len(result.route) == 2
            assert list(result.tokens) == await scene.greedy(24)
            assert 0 < scene.computing.lanes[0].memory.used <= LITTLE

    body()


@in_trio(240)
async def test_the_processor_is_left_alone_where_the_accelerator_has_room(tmp_path: Path, cuda: torch.device) -> None:
    async with two_devices(tmp_path, devices=("cpu", str(cuda))) as scene, scene.client() as client:
        assert [len(lane.memory.keys) > 0 for lane in scene.computing.lanes] == [False, True]
        result = await client.model.generate(PROMPT, Options(max_new_tokens=24))
        assert len(result.route) == 1
        assert list(result.tokens) == await scene.greedy(24)
