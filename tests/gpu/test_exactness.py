"""Needs a GPU. A small decoder there, in every precision, against F32 on the processor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.gpu.decoder import MIDDLE, WHOLE, Decoder, error, hidden, logits, require_precision, seconds_per_block
from torrentlm.compute.border import Border
from torrentlm.compute.device import Device
from torrentlm.records import Span

BOUNDS = {"F32": 1e-4, "BF16": 5e-2, "F16": 1e-2, "INT8": 8e-2, "INT4": 0.5}
"""Relative error of the logits; some three times what rounding does to a decoder of a few layers."""


@pytest.fixture(params=BOUNDS)
def precision(request: pytest.FixtureRequest, device: torch.device) -> str:
    return require_precision(str(request.param), device)


def test_logits(precision: str, decoder: Decoder, device: torch.device, row: Callable[..., None]) -> None:
    found = logits([decoder.held(precision, device).runner(WHOLE)])
    off = error(found, decoder.reference)
    agree = (found.argmax(-1) == decoder.reference.argmax(-1)).sum()
    row(precision, error=off, agree=f"{agree} of {len(found)}")
    assert off < BOUNDS[precision]


def test_a_step_at_a_time_is_what_a_prompt_is(precision: str, decoder: Decoder, device: torch.device) -> None:
    runner = decoder.held(precision, device, MIDDLE).runner(MIDDLE)
    given = hidden(runner, 12)
    whole = runner.forward(runner.open(1, 64), given, 12)
    cache = runner.open(1, 64)
    steps = [runner.forward(cache, Border(tuple(t[:, at : at + 1] for t in given.tensors)), 1) for at in range(12)]
    assert isinstance(whole, Border) and all(isinstance(step, Border) for step in steps)
    joined = torch.cat([step.tensors[0] for step in steps], dim=1)  # type: ignore[union-attr]
    assert joined.device.type == device.type
    assert error(joined.float(), whole.tensors[0].float()) < BOUNDS[precision]


def test_some_blocks_there_and_others_on_the_processor(decoder: Decoder, device: torch.device) -> None:
    first, rest = Span(0, 2), Span(3, WHOLE.last)
    mixed = [
        decoder.held("F32", device, first).runner(first),
        decoder.held("F32", torch.device("cpu"), rest).runner(rest),
    ]
    assert error(logits(mixed), decoder.reference) < BOUNDS["F32"]


def test_time_per_block(precision: str, decoder: Decoder, device: torch.device, row: Callable[..., None]) -> None:
    seconds = seconds_per_block(decoder.held(precision, device, MIDDLE).runner(MIDDLE))
    row(precision, ms_per_block=seconds * 1e3)
    assert seconds > 0


def test_a_device_that_is_there_stays_there(device: torch.device) -> None:
    Device(str(device)).check()
