"""Which small integers stand for a weight, and with which scales: pure functions of one tensor, no calibration data.

INT8: one scale per row, symmetric. INT4: a scale and an offset per ``group`` consecutive weights of a row. Rounding
each weight to the nearest of 16 values between its group's least and greatest wastes them on outliers; so scale and
offset are fitted: half-quadratic quantization (HQQ, Badri & Shaji 2023), which looks for the values that minimise a
norm of the errors for which a few large ones count for less than in the square; here it is the sum of magnitudes. HQQ
fits the offset alone; here the scale is fitted with it, by least squares over what the shrinking leaves, and each group
keeps the best that it saw, so that no group is worse than rounding to nearest by the measure that is minimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32
LEVELS = 16
MIDDLE = 8
NORM = 1.0
ROUNDS = 6
WEIGHTS_AT_ONCE = 1 << 18
"""Weights that are fitted at a time: what fitting works on stays in a processor's cache, and takes little memory."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """``codes`` uint8 [..., n], each below 16; ``scale`` and ``offset`` BF16 [..., n / group]. A weight is
    (code - 8) · scale + offset.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def weights(self) -> torch.Tensor:
        """What the codes stand for, F32 [..., n]."""
        group = self.codes.shape[-1] // self.scale.shape[-1]
        grouped = _grouped(self.codes, group)
        weights = (grouped - MIDDLE) * self.scale.float()[..., None] + self.offset.float()[..., None]
        return weights.flatten(-2)


def by_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8: codes int8 [..., n] and scales BF16 [...] of a floating point ``weight`` [..., n]."""
    weight = weight.float()
    # Rounded to BF16 first, so that the codes are those for the scale that will be used; a row of zeros keeps 1.
    scale = (weight.abs().amax(-1) / 127).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (weight / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


def nearest(weight: torch.Tensor, group: int = GROUP) -> Grouped:
    """INT4, round to nearest: 16 values from the least to the greatest weight of each group."""
    return _codes(_grouped(weight, group), *_span(_grouped(weight, group)))


def by_groups(weight: torch.Tensor, group: int = GROUP) -> Grouped:
    """INT4, fitted: as ``nearest``, with smaller errors. A few rows at a time, so that little memory is taken."""
    if weight.numel() <= WEIGHTS_AT_ONCE or weight.dim() < 2:
        return _fit(_grouped(weight, group))
    flat = weight.flatten(0, -2)
    rows = max(1, WEIGHTS_AT_ONCE // flat.shape[-1])
    parts = [_fit(_grouped(part, group)) for part in torch.split(flat, rows)]
    lead = weight.shape[:-1]
    codes, scale, offset = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "offset"))
    return Grouped(codes.view(*lead, -1), scale.view(*lead, -1), offset.view(*lead, -1))


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    return weight.float().view(*weight.shape[:-1], -1, group)


def _span(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (LEVELS - 1)
    return scale, low + MIDDLE * scale


def _codes(grouped: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Grouped:
    """The nearest codes for a scale and an offset as they will be kept, in BF16."""
    scale, offset = scale.bfloat16(), offset.bfloat16()
    scale = torch.where(scale == 0, torch.full_like(scale, 2.0**-100), scale)
    codes = _round(grouped, scale.float(), offset.float())
    return Grouped((codes + MIDDLE).to(torch.uint8).flatten(-2), scale.squeeze(-1), offset.squeeze(-1))


def _round(grouped: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Codes from -8 to 7, in F32."""
    return ((grouped - offset) / scale).round_().clamp_(-MIDDLE, LEVELS - 1 - MIDDLE)


def _fit(grouped: torch.Tensor) -> Grouped:
    """Half-quadratic splitting: shrink the errors, fit scale and offset to what is left, round again."""
    scale, offset = _span(grouped)
    tiny = torch.finfo(torch.float32).tiny
    unit = scale.clamp_min(tiny)  # errors are measured in steps of the first grid, so that all groups are alike
    best = _codes(grouped, scale, offset)
    least = _badness(grouped, best, unit)
    beta = 4.0
    for _ in range(ROUNDS):
        codes = _round(grouped, scale.clamp_min(tiny), offset)
        error = (grouped - codes * scale - offset) / unit
        shrunk = error.sign() * (error.abs() - (NORM / beta) * error.abs().clamp_min(1e-6).pow(NORM - 1)).clamp_min(0)
        target = grouped - shrunk * unit
        mean_code, mean = codes.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
        spread = (codes - mean_code).square().sum(-1, keepdim=True)
        slope = ((codes - mean_code) * (target - mean)).sum(-1, keepdim=True) / spread.clamp_min(1e-3)
        scale = torch.where((spread > 0) & (slope > 0), slope, scale)
        offset = mean - scale * mean_code
        found = _codes(grouped, scale, offset)
        badness = _badness(grouped, found, unit)
        better = (badness < least).squeeze(-1)
        least = torch.minimum(least, badness)
        best = _choose(better, found, best)
        beta *= 1.05
    return best


def _badness(grouped: torch.Tensor, made: Grouped, unit: torch.Tensor) -> torch.Tensor:
    error = (made.weights().view_as(grouped) - grouped) / unit
    return error.abs().pow(NORM).sum(-1, keepdim=True)


def _choose(better: torch.Tensor, one: Grouped, other: Grouped) -> Grouped:
    """Group for group."""
    group = one.codes.shape[-1] // better.shape[-1]
    codes = torch.where(better.repeat_interleave(group, -1), one.codes, other.codes)
    scale, offset = torch.where(better, one.scale, other.scale), torch.where(better, one.offset, other.offset)
    return Grouped(codes, scale, offset)
