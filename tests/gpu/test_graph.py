"""Needs CUDA or ROCm. A decode step recorded as a graph computes what it computes step by step, where it can be."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from tests.gpu.decoder import MIDDLE, PROMPT, Decoder, finish, hidden
from torrentlm.compute.border import Border
from torrentlm.errors import RefusedError


@pytest.mark.parametrize("precision", ["F32", "F16"])
def test_a_recorded_step(precision: str, decoder: Decoder, cuda: torch.device, row: Callable[..., None]) -> None:
    runner = decoder.held(precision, cuda, MIDDLE).runner(MIDDLE)
    cache, given = runner.open(1, 64), hidden(runner, 1)
    runner.forward(cache, hidden(runner, PROMPT), PROMPT)

    def step() -> torch.Tensor:
        result = runner.forward(cache, given, 1)
        assert isinstance(result, Border)
        runner.trim(cache, PROMPT)  # the next call writes to the same place
        return result.tensors[0]

    aside = torch.cuda.Stream(cuda)
    aside.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(aside):
        for _ in range(3):  # what libraries set up at first use cannot be recorded
            due = step().clone()
    torch.cuda.current_stream(cuda).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            made = step()
    except (RuntimeError, RefusedError) as error:
        row(precision, graph=f"no: {str(error).strip().splitlines()[0]}")
        pytest.skip(f"this step cannot be recorded: {error}")
    with torch.inference_mode():
        made.zero_()
    graph.replay()
    finish(cuda)
    assert torch.equal(made, due)
    begun = time.perf_counter()
    for _ in range(16):
        graph.replay()
    finish(cuda)
    row(precision, graph=f"{(time.perf_counter() - begun) / 16 / len(runner.layers) * 1e3:.3g} ms per block")
