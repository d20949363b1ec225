"""Needs a GPU. Blocks that stay in RAM: locked pages, copies beside computing, the bytes that they take."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio

from tests.gpu.decoder import LAYERS, MIDDLE, WHOLE, Decoder, finish, logits, require_precision, seconds_per_block
from tests.gpu.test_budget import SLACK
from torrentlm.compute.offload import HostBlock, Immediate, Stage, Streamed
from torrentlm.config import NodeConfig
from torrentlm.holder.memory import Memory, pin_all
from torrentlm.holder.model import HeldModel
from torrentlm.node.devices import open_devices
from torrentlm.records import Span
from torrentlm.route.assign import SLABS

ASIDE = (2, 3, 4)
PLENTY = 1 << 40


@pytest.fixture(params=["F32", "BF16", "INT8", "INT4"])
def precision(request: pytest.FixtureRequest, device: torch.device) -> str:
    return require_precision(str(request.param), device)


class Memories:
    """What a lane has."""

    def __init__(self, held: HeldModel) -> None:
        self.device, self.aside = (Memory(PLENTY, free=lambda: PLENTY) for _ in range(2))
        self.device.evicted = self.aside.evicted = held.let_go
        trio.run(self._load, held)

    async def _load(self, held: HeldModel) -> None:
        (await pin_all((self.device, held.units(held.span)), (self.aside, held.units_aside(held.span)))).release()

    def of(self, kind: type[Any]) -> list[Any]:
        return [made for memory in (self.device, self.aside) for made in memory._loaded.values() if type(made) is kind]


def test_logits_are_those_of_resident_blocks(precision: str, decoder: Decoder, device: torch.device) -> None:
    due = logits([decoder.held(precision, device).runner(WHOLE)])
    held = decoder.held(precision, device, offloaded=ASIDE)
    memories = Memories(held)
    assert torch.equal(logits([held.runner(WHOLE)]), due)
    two = [held.runner(Span(0, 2)), held.runner(Span(3, LAYERS + 1))]
    assert torch.equal(logits(two), due)
    [stage] = memories.of(Stage)
    assert isinstance(stage._copies, Streamed if device.type == "cuda" else Immediate)


def test_a_step_beside_its_copies(
    precision: str, decoder: Decoder, device: torch.device, row: Callable[..., None]
) -> None:
    """Milliseconds for each block: what copying alone takes, and a step that copies every block. Beside the table's
    ``ms_per_block`` they say how far the two overlap: the larger of both where all does, their sum where nothing."""
    held = decoder.held(precision, device, MIDDLE, offloaded=tuple(MIDDLE))
    memories = Memories(held)
    taken = seconds_per_block(held.runner(MIDDLE))
    [stage], blocks = memories.of(Stage), memories.of(HostBlock)
    assert len(blocks) == LAYERS
    best = float("inf")
    for _ in range(4):
        finish(device)
        begun = time.perf_counter()
        for block in blocks * 4:
            stage._slabs[0][: block.used].copy_(block.bytes[: block.used], non_blocking=True)
        finish(device)
        best = min(best, (time.perf_counter() - begun) / 4 / len(blocks))
    row(precision, copy_ms=best * 1000, offloaded_ms=taken * 1000)


def test_pages_are_locked_as_long_as_they_are_used(decoder: Decoder, cuda: torch.device) -> None:
    memories = Memories(decoder.held("F32", cuda, offloaded=ASIDE))
    blocks = memories.of(HostBlock)
    assert len(blocks) == len(ASIDE) and all(block.bytes.is_pinned() for block in blocks)
    pages = blocks[0].bytes
    del blocks, memories
    gc.collect()
    assert not pages.is_pinned()


@pytest.mark.parametrize("kept", ["F32", "INT4"])
def test_the_device_has_two_slabs_and_what_is_resident(kept: str, decoder: Decoder, cuda: torch.device) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(cuda)
    held = decoder.held(kept, cuda, offloaded=tuple(MIDDLE))
    memories = Memories(held)
    [stage] = memories.of(Stage)
    assert memories.device.used >= SLABS * stage._slabs[0].nbytes
    assert torch.cuda.memory_allocated(cuda) - before <= memories.device.used + SLACK
    logits([held.runner(WHOLE)])
    gc.collect()
    assert torch.cuda.memory_allocated(cuda) - before <= memories.device.used + 2 * SLACK  # ghosts, tables of positions
    assert memories.aside.relieve() and memories.device.relieve()
    del stage, held, memories
    gc.collect()
    assert torch.cuda.memory_allocated(cuda) - before <= 2 * SLACK


def test_no_copy_overtakes_what_computes(cuda: torch.device) -> None:
    """The device is kept busy before each block, so that the copies for later ones would be there long before."""
    size, dtype = 64 << 20, torch.float32
    weights = [("w", torch.empty(size // 4))]
    blocks = []
    for place in range(5):
        weights[0][1].fill_(place)
        blocks.append(HostBlock(place, range(place, place + 1), weights, size, {"w": dtype}, cuda))
    stage = Stage(cuda, size)
    there = [stage.tensors(block)["w"] for block in blocks]
    found = []
    for _ in range(4):
        with stage.turn():
            for block, tensor in zip(blocks, there, strict=True):
                stage.bring(block)
                torch.cuda._sleep(20_000_000)
                found.append(torch.stack((tensor.min(), tensor.max())))
                stage.done(block)
    due = torch.arange(5.0).repeat(4)
    assert torch.equal(torch.stack(found).cpu(), torch.stack((due, due), 1))


def test_a_node_measures_what_offloading_costs(cuda: torch.device, tmp_path: Any) -> None:
    config = NodeConfig(tmp_path, devices=(str(cuda),), offload=1 << 30)
    [opened] = open_devices(config)
    assert opened.offload == 1 << 30 and opened.upload > 0
