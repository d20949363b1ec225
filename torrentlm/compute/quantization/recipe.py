"""Which of a model's weights are quantized: matrices that linear layers multiply by, and nothing else.

Norms, biases, embeddings and convolutions stay as they are, and so do routers, which a small error sends another way:
layers with as many outputs as there are experts beside them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from torrentlm.compute.precision import can_store
from torrentlm.compute.quantization.packed import pack
from torrentlm.compute.quantization.tensor import QuantizedTensor

VERSION = 1
"""Raise it when the same weights would come out otherwise, or lie otherwise: files kept on disk are made again then."""


def matrices(model: nn.Module) -> dict[str, bool]:
    """Names of the parameters that may be quantized, and whether each lies as [in, out]."""
    found: dict[str, bool] = {}
    for prefix, module in model.named_modules():
        routers = _expert_counts(module)
        for key, child in module.named_children():
            if isinstance(child, nn.Linear | Conv1D) and child.weight.dim() == 2:
                turned = isinstance(child, Conv1D)
                if child.weight.shape[1 if turned else 0] not in routers:
                    found[_join(prefix, key, "weight")] = turned
        if not isinstance(module, _ConvNd):
            own = module.named_parameters(recurse=False)
            found.update({_join(prefix, key): False for key, parameter in own if parameter.dim() == 3})
    return found


def quantized(weight: torch.Tensor, kind: str, dtype: torch.dtype, turned: bool) -> torch.Tensor:
    """``weight`` as it is stored in ``kind``; in ``dtype`` where its shape does not allow that."""
    matrix = weight.transpose(-1, -2) if turned else weight
    if not weight.is_floating_point() or not can_store(tuple(matrix.shape), kind):
        return weight.to(dtype)
    return QuantizedTensor(pack(matrix, kind), dtype, turned)


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module has, in a list of modules or in parameters that hold one matrix for each."""
    return set(_counts(module))


def _counts(module: nn.Module) -> Iterator[int]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield len(child)
        yield from (grandchild.__len__() for grandchild in child.children() if isinstance(grandchild, nn.ModuleList))
        yield from (own.shape[0] for own in child.parameters(recurse=False) if own.dim() == 3)
    yield from (own.shape[0] for own in module.parameters(recurse=False) if own.dim() == 3)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
