"""Weights that no checkpoint holds, since the model's own code makes them, always the same: tables of sines and such.

They are published like any other, so that holders need not know which these are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from torrentlm.compute.border import DTYPE_NAMES
from torrentlm.compute.skeleton import replace_parameters
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.publish.source import CHUNK, Source

SEEDS = (1, 2)
MAX_NUMBERS = 1 << 26
"""Of a tensor that is tried: tables of positions are small."""


def made_by_model(skeleton: PreTrainedModel, missing: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of the ``missing`` parameters that the model initialises to the same values whatever the seed, in fp32.

    What comes out as zeros or ones is none of them: so begins what is to be learned.
    """
    made: dict[str, torch.Tensor] = {}
    parameters = dict(skeleton.named_parameters())
    for name in missing:
        path, _, key = name.rpartition(".")
        if name not in parameters or parameters[name].numel() > MAX_NUMBERS:
            continue
        one, other = (_initialised(skeleton, skeleton.get_submodule(path), key, seed) for seed in SEEDS)
        if (
            one is not None
            and other is not None
            and torch.equal(one, other)
            and len(set(one.flatten()[:1000].tolist())) > 2
        ):
            made[name] = one
    return made


def _says_something(values: torch.Tensor) -> bool:
    return len(set(values.flatten()[:1000].tolist())) > 2


def _initialised(skeleton: PreTrainedModel, module: nn.Module, key: str, seed: int) -> torch.Tensor | None:
    alone = copy.deepcopy(module)
    replace_parameters(alone, lambda name, parameter: nn.Parameter(torch.zeros(parameter.shape)))
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        try:
            skeleton._init_weights(alone)
        except Exception:  # any model's own code runs here; what it cannot make is missing
            return None
    made = alone._parameters.get(key)
    return None if made is None else made.detach()


class WithMade:
    """A source with ``made`` tensors beside its own."""

    def __init__(self, source: Source, made: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._made = made

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        specs = {name: TensorSpec(name, DTYPE_NAMES[one.dtype], tuple(one.shape)) for name, one in self._made.items()}
        return {**self._source.tensors, **specs}

    def read(self, name: str) -> Iterator[memoryview]:
        if name not in self._made:
            yield from self._source.read(name)
            return
        data = self._made[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]

    def files(self) -> Mapping[str, bytes]:
        return self._source.files()
