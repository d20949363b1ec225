"""Quantized matrices as they lie in memory and on the disk, and their products with activations.

Where torch has a kernel for a device that reads the small weights directly, it is used, once it has given the right
result for a small matrix; everywhere else, and for many tokens at once, where they are slower (measured, see
docs/precision.md), the weights are made floating point again for one product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from torrentlm.compute.quantization.rounding import GROUP, MIDDLE, Grouped, by_groups, by_rows

TILE = 32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 64
"""Rows whose codes torch's INT4 kernel for processors reads together, with AVX2 or AVX-512: the first half's codes lie
in the low four bits, the second half's in the high ones."""
FEW = 8
"""Rows of activations up to which the kernels for processors beat making the weights floating point."""
TOLERANCE = 0.02
"""Of a kernel's product, relative: BF16 rounds to 0.004."""


@dataclass(frozen=True, slots=True)
class Packed:
    """``kind`` "INT8": ``codes`` int8 [..., out, in], ``scales`` BF16 [..., out].
    "INT4": ``codes`` uint8, two to a byte, [..., out / tile, in, tile / 2] with ``tile`` rows of the matrix together
    (tile 0: [..., out, in / 2]), ``scales`` BF16 [..., in / group, out, 2], each group's scale and offset.
    """

    kind: str
    codes: torch.Tensor
    scales: torch.Tensor
    tile: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, or of the matrices: [..., out, in]."""
        if self.kind == "INT8":
            return tuple(self.codes.shape)
        *lead, rows, columns = self.codes.shape
        if self.tile:
            return (*lead[:-1], lead[-1] * self.tile, rows)
        return (*lead, rows, columns * 2)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def __getitem__(self, index: int | torch.Tensor) -> Packed:
        """Along the first dimension of three or more: one matrix, or several."""
        return replace(self, codes=self.codes[index], scales=self.scales[index])

    def to(self, device: torch.device) -> Packed:
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in ``dtype``, [..., out, in]."""
        if self.kind == "INT8":
            return self.codes.to(dtype).mul_(self.scales.to(dtype)[..., None])
        codes = _unpacked(self.codes, self.tile)
        scales = self.scales.transpose(-3, -2).to(dtype)  # [..., out, groups, 2]
        weights = codes.to(dtype).sub_(MIDDLE).view(*codes.shape[:-1], scales.shape[-2], -1)
        return weights.mul_(scales[..., :1]).add_(scales[..., 1:]).flatten(-2)

    def product(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` [..., in] times the transposed matrix: [..., out], in the dtype of ``value``."""
        if 0 < value.numel() <= FEW * self.shape[-1] and self._has_kernel(value.device):
            rows = value.reshape(-1, value.shape[-1]).bfloat16().contiguous()
            return _kernel(self, rows).to(value.dtype).view(*value.shape[:-1], -1)
        return functional.linear(value, self.dense(value.dtype))

    def _has_kernel(self, device: torch.device) -> bool:
        if len(self.shape) != 2 or self.codes.device != device:
            return False
        return (self.kind == "INT8" or self.tile == TILE) and kernel_works(self.kind, device)


def pack(weight: torch.Tensor, kind: str) -> Packed:
    """Quantize a floating point ``weight`` [..., out, in] to INT8 or INT4, on its own device.

    INT4 needs ``in`` to be a multiple of ``GROUP``.
    """
    weight = weight.contiguous()
    if kind == "INT8":
        return Packed(kind, *by_rows(weight))
    return pack_groups(by_groups(weight, GROUP))


def pack_groups(grouped: Grouped) -> Packed:
    """Codes as they lie in memory: as torch's kernel reads them where that is possible."""
    codes = grouped.codes
    tile = TILE if codes.shape[-2] % TILE == 0 else 0
    scales = torch.stack((grouped.scale, grouped.offset), -1).transpose(-3, -2).contiguous()
    return Packed("INT4", _nibbles(codes, tile), scales, tile)


def _nibbles(codes: torch.Tensor, tile: int) -> torch.Tensor:
    if not tile:
        return codes[..., ::2] | codes[..., 1::2] << 4
    low, high = codes.view(*codes.shape[:-2], -1, 2, tile // 2, codes.shape[-1]).unbind(
        -3
    )  # each [..., out / tile, tile / 2, in]
    return (low | high << 4).transpose(-1, -2).contiguous()


def _unpacked(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """uint8 [..., out, in], each below 16."""
    low, high = codes & 15, codes >> 4
    if not tile:
        return torch.stack((low, high), -1).flatten(-2)
    return torch.cat((low, high), -1).transpose(-1, -2).flatten(-3, -2)


def _kernel(packed: Packed, rows: torch.Tensor) -> torch.Tensor:
    operations: Any = torch.ops.aten
    made: torch.Tensor
    if packed.kind == "INT8":
        made = operations._weight_int8pack_mm(rows, packed.codes, packed.scales)
    else:
        out, width = packed.shape
        codes = packed.codes.view(out, width // 2)
        made = operations._weight_int4pack_mm_for_cpu(rows, codes, GROUP, packed.scales)
    return made


@cache
def kernel_works(kind: str, device: torch.device) -> bool:
    """Whether torch's kernel for this kind of weights runs on this device and gives what the weights stand for.

    What it expects in memory depends on torch's build and the processor, so it is tried, on a small matrix.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False  # torch's loops for processors without vectors are slower than anything
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * TILE, 4 * GROUP, generator=made).to(device)
    rows = torch.randn(3, 4 * GROUP, generator=made).to(device).bfloat16()
    packed = pack(weight, kind)
    due = rows.float() @ packed.dense(torch.float32).T
    try:
        found = _kernel(packed, rows).float()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((found - due).norm() <= TOLERANCE * due.norm())
