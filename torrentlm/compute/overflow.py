"""Whether a part of a model stays within what F16 can hold, on the recorded sample: some models' activations do not."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torrentlm.compute.samples import check
from torrentlm.compute.span import SpanRunner
from torrentlm.manifest.sidecar import Samples

F16_MAX = torch.finfo(torch.float16).max
_ARITHMETIC = frozenset(("mm", "bmm", "addmm", "baddbmm", "add", "mul", "pow"))
MARGIN = 4
"""A text of a few tokens does not reach all that other texts do."""


def overflows(runner: SpanRunner, samples: Samples) -> bool:
    """Whether weights exceed F16, or what is computed for the sample comes near to it. ``runner`` computes in F32 or
    BF16; False where the sample has nothing for it.
    """
    if any(_greatest(tensor) > F16_MAX for tensor in runner.weights):
        return True
    with _Peak() as peak:
        checked = check(runner, samples)
    return checked is not None and peak.value > F16_MAX / MARGIN


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In its ``with``: the greatest magnitude that any operation makes, but for what masks are made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] not in _ARITHMETIC:  # what lies in fresh memory was not computed
            return made
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.value = max(self.value, _greatest(tensor))
        return made


def _greatest(tensor: torch.Tensor) -> float:
    """The greatest magnitude; what is infinite or as good as that masks, and counts for nothing."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    magnitudes = tensor.detach().abs()
    mask = torch.finfo(tensor.dtype).max / 2
    return float(torch.where(magnitudes < mask, magnitudes, torch.zeros_like(magnitudes)).max())
