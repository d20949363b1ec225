"""How fast a device is, found by trying: a few seconds for each device, then remembered (compute/costs.py).

A rate is that of the best of several tries: other programs only ever make it look lower, and what is remembered should
not hang on what else ran that day.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional

from torrentlm.compute.costs import Key, Measurement, PrecisionCost, recall, remember
from torrentlm.compute.devices import DeviceInfo
from torrentlm.compute.quantization.packed import Packed, pack
from torrentlm.compute.skeleton import MODEL_ERRORS, first_line
from torrentlm.errors import ConfigError, StorageError, UnsupportedModelError

METHOD = 1
"""Raise it when what is measured changes, so that what was remembered is measured again."""
SLICE_S = 0.15
"""How long one thing is tried."""
TRIES, PATIENCE_S = 3, 1.0
"""At least so often, unless it takes that long: a core may be busy with something else for longer than a slice."""
WRONG = 0.5
"""A product that is off by this much, relative to F32's, is no product."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A weight in some precision on some device: ``product(x, *weights)`` is x [n, in] times it, [n, out], where x is
    of the dtype ``activations``."""

    weights: tuple[torch.Tensor, ...]
    activations: torch.dtype
    product: Callable[..., torch.Tensor]


Prepare = Callable[[torch.Tensor, torch.device], Prepared]
"""Makes that of a weight F32 [out, in] on the processor. Where the device or torch lacks the precision it raises
ConfigError with a sentence, or whatever torch raises."""


def plain(dtype: torch.dtype, weight: torch.Tensor, device: torch.device) -> Prepared:
    """A weight in a dtype that torch multiplies as it is."""
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(f"{device} has no arithmetic for BF16; use F16 or F32.")
    return Prepared((weight.to(device=device, dtype=dtype),), dtype, functional.linear)


def quantized(kind: str, weight: torch.Tensor, device: torch.device) -> Prepared:
    """A weight as blocks keep it in INT8 or INT4, made on the device; its products are computed in BF16."""
    made = pack(weight.to(device=device, dtype=torch.bfloat16), kind)

    def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return Packed(kind, codes, scales, made.tile).product(x)

    return Prepared((made.codes, made.scales), torch.bfloat16, product)


PRECISIONS: dict[str, Prepare] = {
    "F32": partial(plain, torch.float32),
    "BF16": partial(plain, torch.bfloat16),
    "F16": partial(plain, torch.float16),
    "INT8": partial(quantized, "INT8"),
    "INT4": partial(quantized, "INT4"),
}
"""What is measured, by the names that model.toml and records have for it. A new precision is a new line."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is multiplied: weights [side, side], enough of them that no cache holds all (``working_set`` bytes), and
    ``prompt`` tokens. ``copied``: bytes of one upload."""

    side: int
    prompt: int
    working_set: int
    copied: int


PROCESSOR = Sizes(side=2048, prompt=128, working_set=256 << 20, copied=64 << 20)
ACCELERATOR = Sizes(side=4096, prompt=512, working_set=512 << 20, copied=256 << 20)
TRIED_SIDE = 256
"""Of the matrix that is multiplied only to see whether a precision is there."""
_CHECKED = 8  # tokens whose products are compared
_MAX_COPIES = 128


def measured(
    devices: Sequence[DeviceInfo],
    folder: Path,
    say: Callable[[str], None],
    *,
    again: bool = False,
    precisions: Mapping[str, Prepare] = PRECISIONS,
) -> tuple[Measurement, ...]:
    """What every one of ``devices`` that can be used does, from ``folder`` unless ``again``, measured otherwise.

    ``say`` gets one sentence if it cannot be remembered there. Blocks for seconds where it measures.
    """
    found, complaint = [], ""
    for device in devices:
        if device.problem:
            continue
        key = key_of(device, precisions)
        known = None if again else recall(folder, key)
        if known is None:
            known = measure(device, precisions)
            try:
                remember(folder, key, known)
            except StorageError as error:
                complaint = str(error)
        found.append(known)
    if complaint:
        say(complaint)
    return tuple(found)


def key_of(device: DeviceInfo, precisions: Mapping[str, Prepare] = PRECISIONS) -> Key:
    """What a measurement of ``device`` in this process holds for."""
    return {
        "method": METHOD,
        "torch": version("torch"),
        "torrentlm": version("torrentlm"),
        "device": device.name,
        "model": device.model,
        "features": list(device.features),
        "driver": device.driver,
        "threads": 0 if device.accelerates else torch.get_num_threads(),
        "precisions": list(precisions),
    }


def measure(
    device: DeviceInfo, precisions: Mapping[str, Prepare] = PRECISIONS, sizes: Sizes | None = None
) -> Measurement:
    """Measure now. Raises ConfigError if the device cannot even copy."""
    begun, load = time.perf_counter(), _load()
    sizes = _within(device, sizes or (ACCELERATOR if device.accelerates else PROCESSOR))
    where = torch.device(device.name)
    weight = _weight(sizes.side)
    with torch.inference_mode():
        try:
            read, upload, pinned = _copies(where, sizes)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{device.name} ({device.model}) cannot be measured: {first_line(error)}; close what else uses it, or"
                " leave it out with --devices."
            ) from error
        costs = tuple(_cost(name, prepare, weight, where, sizes) for name, prepare in precisions.items())
    return Measurement(device.name, read, upload, pinned, costs, time.perf_counter() - begun, load)


def tried(device: torch.device, precisions: Mapping[str, Prepare] = PRECISIONS) -> dict[str, PrecisionCost]:
    """Which precisions are there, by one small product in each, which takes milliseconds: their rates are 0."""
    weight = _weight(TRIED_SIDE)
    with torch.inference_mode():
        return {name: _cost(name, prepare, weight, device, None) for name, prepare in precisions.items()}


def _weight(side: int) -> torch.Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(0)) / math.sqrt(side)


def _load() -> float:
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def _within(device: DeviceInfo, sizes: Sizes) -> Sizes:
    """At most a quarter of the memory that is free now, so that measuring does not disturb what else is there."""
    most = max(device.memory_free // 4, 1 << 20)
    return replace(sizes, working_set=min(sizes.working_set, most), copied=min(sizes.copied, most // 2))


def _copies(device: torch.device, sizes: Sizes) -> tuple[float, float, float]:
    """Bytes per second: read on the device, uploaded from pages, uploaded from locked pages."""
    source = torch.ones(sizes.copied // 4)
    target = torch.ones(sizes.working_set // 4, device=device)
    read = _rate(lambda: target.sum(), device, target.nbytes)
    there = target[: source.numel()]
    upload = _rate(lambda: there.copy_(source), device, source.nbytes)
    if device.type != "cuda":
        return read, upload, 0.0
    try:
        locked = source.pin_memory()
    except RuntimeError:
        return read, upload, 0.0
    return read, upload, _rate(lambda: there.copy_(locked, non_blocking=True), device, source.nbytes)


def _cost(
    name: str, prepare: Prepare, weight: torch.Tensor, device: torch.device, sizes: Sizes | None
) -> PrecisionCost:
    """Without ``sizes`` its rates are not measured."""
    try:
        prepared = prepare(weight, device)
        error = _error(prepared, weight, device)
        if not error < WRONG:
            return PrecisionCost(name, lacking=f"{device} computes something else than products in {name} here.")
        decode, prompt = (0.0, 0.0) if sizes is None else _products(prepared, device, sizes)
    except (ConfigError, UnsupportedModelError) as reason:
        return PrecisionCost(name, lacking=str(reason))
    except (*MODEL_ERRORS, ImportError) as reason:
        return PrecisionCost(
            name, lacking=f"{device} or torch {torch.__version__} lacks {name} ({first_line(reason).rstrip('.')})."
        )
    size = sum(part.nbytes for part in prepared.weights)
    return PrecisionCost(name, size / weight.numel(), decode * weight.numel(), prompt * weight.numel(), error)


def _products(prepared: Prepared, device: torch.device, sizes: Sizes) -> tuple[float, float]:
    """(matrices passed by one vector, matrices × tokens of a prompt) per second."""
    size = sum(part.nbytes for part in prepared.weights)
    copies = min(max(sizes.working_set // size, 1), _MAX_COPIES)
    weights = [prepared.weights, *(tuple(part.clone() for part in prepared.weights) for _ in range(copies - 1))]
    x = torch.randn(sizes.prompt, sizes.side, device=device).to(prepared.activations)

    def decode() -> None:
        for parts in weights:
            prepared.product(x[:1], *parts)

    def prompt() -> None:
        prepared.product(x, *prepared.weights)

    return _rate(decode, device, len(weights)), _rate(prompt, device, sizes.prompt)


def _error(prepared: Prepared, weight: torch.Tensor, device: torch.device) -> float:
    """Relative to F32 on the processor, root mean square; NaN where the product has one."""
    x = torch.randn(_CHECKED, weight.shape[1], generator=torch.Generator().manual_seed(1))
    due = functional.linear(x, weight)
    got = prepared.product(x.to(device=device, dtype=prepared.activations), *prepared.weights)
    return float((got.to(device="cpu", dtype=torch.float32) - due).norm() / due.norm())


def _rate(work: Callable[[], object], device: torch.device, amount: float) -> float:
    """``amount`` per second of ``work()``, the best of several tries behind one to warm up."""
    work()
    _finish(device)
    best, tries, spent = math.inf, 0, 0.0
    while spent < SLICE_S or (tries < TRIES and spent < PATIENCE_S):
        begun = time.perf_counter()
        work()
        _finish(device)
        took = time.perf_counter() - begun
        best, tries, spent = min(best, took), tries + 1, spent + took
    return amount / max(best, 1e-9)


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
