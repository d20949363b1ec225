"""Which precision each block is kept and computed in: pure functions of sizes, budget and what the device costs.

What is configured is `configured`; what fits a budget is `choose`. A node asks both through node/precisions.py.

One dtype is computed in; INT8 and INT4 are forms that a block of layers is stored in. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torrentlm.errors import ConfigError
from torrentlm.manifest.canonical import DTYPE_BYTES, FLOATING, TensorSpec
from torrentlm.manifest.manifest import Manifest

COMPUTED = ("F32", "BF16", "F16")
STORED = ("INT8", "INT4")
FINEST_FIRST = (*COMPUTED, *STORED)
"""A floor allows itself and what stands before it; F16 and BF16 count as equally fine."""
INT4_GROUP = 32
LEAST_SIDE = 32
"""Matrices with a shorter side are not worth quantizing."""
LOSS = {"F32": 0.0, "F16": 0.00002, "BF16": 0.001}
"""About the KL divergence to F32, nats per token; see docs/precision.md."""


class Cost(Protocol):
    """What a precision costs on a device, as it was measured: ``decode`` in weights per second; ``lacking`` is a
    sentence where the device or torch cannot do it, else "".
    """

    @property
    def decode(self) -> float: ...

    @property
    def lacking(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Precisions:
    """``compute`` is the dtype that is computed in, ``stored`` the blocks that are kept in INT8 or INT4."""

    compute: str
    stored: Mapping[int, str] = field(default_factory=dict)

    def of(self, block: int) -> str:
        return self.stored.get(block, self.compute)

    def said(self, blocks: Collection[int]) -> str:
        """For people and records, at most 16 characters: ``BF16``, ``INT4``, ``INT8+INT4``."""
        used = {self.of(block) for block in blocks} or {self.compute}
        return "+".join(sorted(used, key=FINEST_FIRST.index))[:16]


@dataclass(frozen=True, slots=True)
class BlockSize:
    """The tensors of a block; one that other blocks share is counted with one of them. Only blocks of layers are
    ``storable`` in INT8 and INT4.
    """

    specs: tuple[TensorSpec, ...]
    storable: bool = True

    def bytes_in(self, precision: str, compute: str) -> int:
        stored = precision if self.storable and precision in STORED else None
        return sum(bytes_as(spec, compute, stored) for spec in self.specs)


class TooLargeError(ConfigError):
    """Nothing allowed fits: ``least`` bytes would do, in ``precisions``."""

    def __init__(self, least: int, budget: int, precisions: Precisions) -> None:
        super().__init__(
            f"these blocks need at least {least / 1e6:,.1f} MB in the precisions allowed, and {budget / 1e6:,.1f} MB "
            "are there: raise the budget or name fewer blocks"
        )
        self.least = least
        self.precisions = precisions


def can_store(shape: Sequence[int], kind: str) -> bool:
    """Whether a weight of this shape, [..., out, in], can be kept in INT8 or INT4."""
    if len(shape) not in (2, 3) or min(shape[-2:]) < LEAST_SIDE:
        return False
    return kind == "INT8" or shape[-1] % INT4_GROUP == 0


def bytes_as(spec: TensorSpec, compute: str, stored: str | None = None) -> int:
    """What a tensor takes in memory when ``compute`` is computed in and, if given, ``stored`` is how it is kept.

    From the shape alone: a router or an embedding inside a layer, which stay as they are, count as matrices.
    """
    count = math.prod(spec.shape)
    if spec.dtype not in FLOATING:
        return count * DTYPE_BYTES[spec.dtype]
    if stored is None or not can_store(spec.shape, stored):
        return count * DTYPE_BYTES[compute]
    rows = math.prod(spec.shape[:-1])
    return count + 2 * rows if stored == "INT8" else count // 2 + 4 * (count // INT4_GROUP)


BOUNDARY = 256
"""Bytes at whose multiples the tensors of an offloaded block begin: more than what processors (64) and GPUs' products
(128) want, so that they round as they do elsewhere."""


def packed_bytes(size: int, tensors: int) -> int:
    """Bytes enough for a block's ``tensors``, of ``size`` bytes together, one behind the other; one in INT8 or INT4 is
    two."""
    return -(-size // BOUNDARY) * BOUNDARY + 2 * BOUNDARY * tensors


def file_forms(manifest: Manifest, stored: Mapping[int, str]) -> dict[str, str]:
    """The files that are kept in INT8 or INT4, by name: of blocks of layers alone, and as the first of these says."""
    forms: dict[str, str | None] = {}
    for block, entry in enumerate(manifest.blocks):
        for file in manifest.block_files(block):
            forms[file.name] = forms.get(file.name, stored.get(block)) if entry.kind == "layers" else None
    return {name: form for name, form in forms.items() if form is not None}


def compute_dtype(precision: str, published: str) -> str:
    """What is computed in where a node is told ``precision`` ("auto": what was published).

    INT8 and INT4 compute in BF16: torch's kernels for them do.
    """
    if precision == "auto":
        return published
    return "BF16" if precision in STORED else precision


def allowed(precision: str, floor: str | None) -> bool:
    """Whether a model with that floor may be run so."""
    rank = {"F32": 0, "BF16": 1, "F16": 1, "INT8": 2, "INT4": 3}
    return floor is None or rank.get(precision, 0) <= rank[floor]


def require_allowed(precision: str, floor: str | None) -> None:
    """Raise ConfigError if the model's publisher forbids so low a precision."""
    if not allowed(precision, floor):
        raise ConfigError(f"this model's publisher allows no precision below {floor}: {precision} is; choose {floor}")


def configured(
    precision: str,
    precision_of: Sequence[tuple[range, str]],
    published: str,
    storable: Collection[int],
    floor: str | None,
) -> Precisions:
    """What an operator asked for: ``precision`` for all blocks, and another one for some.

    Raises ConfigError for what the floor forbids, or for two dtypes to compute in.
    """
    compute = compute_dtype(precision, published)
    require_allowed(precision if precision != "auto" else compute, floor)
    stored = dict.fromkeys(storable, precision) if precision in STORED else {}
    for blocks, other in precision_of:
        require_allowed(other, floor)
        if other not in STORED and other != compute:
            raise ConfigError(
                f"precision_of names {other} where {compute} is computed in, and a node computes in one dtype: "
                f"name INT8, INT4 or {compute} there, or set precision = {other!r}"
            )
        for block in blocks:
            stored.pop(block, None)
            if other in STORED and block in storable:
                stored[block] = other
    return Precisions(compute, stored)


def choose(
    blocks: Mapping[int, BlockSize],
    budget: int,
    costs: Mapping[str, Cost],
    published: str,
    *,
    floor: str | None = None,
    overflowing: Collection[int] | None = None,
    fixed: Mapping[int, str] | None = None,
) -> Precisions:
    """Precisions for these blocks: the published dtype where it fits ``budget`` bytes, else as little less as does.

    ``overflowing`` blocks exceed what F16 can hold; None: nobody knows, and F16 is for models published in it. Blocks
    in ``fixed`` stay as named; a dtype named there is the one that is computed in. INT8 comes before INT4, and the
    middle blocks before those at the ends, which matter more. Raises TooLargeError where nothing fits, with the least
    that would do, and ConfigError where the device lacks whatever the floor allows.
    """
    fixed = {block: name for block, name in (fixed or {}).items() if block in blocks}
    usable = _computable(costs, published, floor, overflowing, fixed)
    kinds = [kind for kind in STORED if _usable(kind, costs, floor)]
    smallest_first = sorted(usable, key=DTYPE_BYTES.__getitem__)  # where much must go, no room is left for F32
    for compute, lower in [*((name, ()) for name in usable), *((name, kinds) for name in smallest_first)]:
        chosen, needed = _lower(blocks, budget, compute, lower, fixed)
        if needed <= budget:
            return chosen
    lowest, least = min((_lower(blocks, -1, name, kinds, fixed) for name in smallest_first), key=lambda found: found[1])
    raise TooLargeError(least, budget, lowest)


def _computable(
    costs: Mapping[str, Cost],
    published: str,
    floor: str | None,
    overflowing: Collection[int] | None,
    fixed: Mapping[int, str],
) -> list[str]:
    """The dtypes that may be computed in, in the order in which they are tried; at least one."""
    no_f16 = published != "F16" if overflowing is None else bool(overflowing)
    named = set(fixed.values()).intersection(COMPUTED)
    usable = [
        name
        for name in COMPUTED
        if _usable(name, costs, floor) and not (name == "F16" and no_f16) and (not named or name in named)
    ]
    if not usable:
        raise ConfigError(_lacking(costs, floor))
    return sorted(usable, key=lambda name: _preference(name, published, costs))


def _usable(name: str, costs: Mapping[str, Cost], floor: str | None) -> bool:
    return name in costs and not costs[name].lacking and allowed(name, floor)


def _lacking(costs: Mapping[str, Cost], floor: str | None) -> str:
    sentences = [costs[name].lacking for name in COMPUTED if name in costs and costs[name].lacking]
    return sentences[0] if sentences else f"this device has no precision that the model's floor {floor} allows"


def _preference(name: str, published: str, costs: Mapping[str, Cost]) -> tuple[int, float, float]:
    """The order in which dtypes are tried: the published one, then F32, which does what a device may lack, then the
    faster one, then by what is lost.

    F32 is not taken for its speed: it is a copy of twice the size of what is mapped in BF16.
    """
    if name in (published, "F32"):
        return (0 if name == published else 1), 0.0, 0.0
    return 2, -costs[name].decode, LOSS[name]


def _lower(
    blocks: Mapping[int, BlockSize], budget: int, compute: str, kinds: Sequence[str], fixed: Mapping[int, str]
) -> tuple[Precisions, int]:
    """Lower block by block until it fits, and what is needed then."""
    stored = {block: kind for block, kind in fixed.items() if kind in STORED and block in blocks}
    needed = sum(size.bytes_in(stored.get(block, compute), compute) for block, size in blocks.items())
    middle = (min(blocks, default=0) + max(blocks, default=0)) / 2
    for kind in kinds:
        for block in sorted(blocks, key=lambda block: (abs(block - middle), block)):
            if needed <= budget:
                return Precisions(compute, stored), needed
            size = blocks[block]
            if block in fixed or not size.storable:
                continue
            saved = size.bytes_in(stored.get(block, compute), compute) - size.bytes_in(kind, compute)
            if saved > 0:
                stored[block], needed = kind, needed - saved
    return Precisions(compute, stored), needed
