"""A step that the device has no memory for, half-way: the session is as it was, and the step can be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.compute.checkpoints import Chain, cut
from tests.unit.compute.kinds import KINDS, ids
from torrentlm.compute.border import pack, unpack
from torrentlm.compute.chain import step
from torrentlm.errors import OutOfMemoryError
from torrentlm.wire.tensors import Tensor

STATEFUL = ["plain", "windows", "experts", "shared modules", "per layer", "shared states", "state space"]
NEVER = 1 << 30


class Scarce:
    """Lets ``left`` more linear layers compute, and then says once what torch says when there is no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = NEVER
        original = nn.functional.linear

        def linear(*args: Any) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                self.left = NEVER
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
            return original(*args)

        monkeypatch.setattr(nn.functional, "linear", linear)


def insisting(chain: Chain, given: torch.Tensor, scarce: Scarce) -> tuple[torch.Tensor, int]:
    """One step through all parts, of which each fails at first, later and later; how often it failed."""
    tensors: tuple[Tensor, ...] = (pack(given),)
    failures = 0
    for runner, cache in chain.hops:
        made = None
        scarce.left = 1
        while made is None:
            try:
                made = step(runner, cache, tensors, given.shape[1])
            except OutOfMemoryError:
                failures += 1
                scarce.left = 4 * failures
        tensors = made
        scarce.left = NEVER
    return unpack(tensors[0]), failures


@pytest.mark.parametrize("name", STATEFUL)
def test_the_step_can_be_run_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = cut(KINDS[name].build(), tmp_path).thirds()
    scarce = Scarce(monkeypatch)
    undisturbed, disturbed = Chain(runners, 1, 32), Chain(runners, 1, 32)
    for given in (ids(1, 9, 1), ids(1, 1, 2), ids(1, 1, 3)):
        expected = undisturbed.step(given)
        made, failures = insisting(disturbed, given, scarce)
        assert torch.equal(made, expected)
        assert failures >= len(runners)
