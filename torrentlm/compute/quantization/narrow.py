"""Weights that stay in the narrower floating point type that they lie in, while what is computed is wider.

A product makes one matrix wide for itself and drops it, so that a block that is mapped from a file needs, beside its
pages, the memory of its largest matrix alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

AS_PUBLISHED = "published"
"""What ``Quantization`` calls it, beside INT8 and INT4."""
LEAST = 1 << 18
"""Numbers in a weight from which on it is worth it."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """``values`` as they lie in the file, [..., out, in]; the same face as ``Packed``."""

    values: torch.Tensor

    @property
    def kind(self) -> str:
        return AS_PUBLISHED

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __getitem__(self, index: int | torch.Tensor) -> Narrow:
        """Along the first dimension: one matrix, several, or rows of one."""
        return replace(self, values=self.values[index])

    def to(self, device: torch.device) -> Narrow:
        return replace(self, values=self.values.to(device))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype)

    def product(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [..., in] times the transposed matrix: [..., out], in the dtype of ``value``."""
        return functional.linear(value, self.values.to(value.dtype))
