"""Samples of what blocks compute, as a sidecar has them: how they are recorded, and how a block is checked against one.

A sample is what travelled over the borders for a few tokens of text. One block's input is there in full, and its output
as well, since that is the next block's input; of the head's output a part. In F32 what a block computes is told apart
to 1e-3 of what it changes, which is far more than processors differ by. Where F32 would take too much room values are
rounded to BF16, and a block in lower precision rounds, too: what may differ then is told by ``_ALLOWED``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from torrentlm.compute.border import DTYPE_NAMES, DTYPES, pack, unpack
from torrentlm.compute.cache import SpanCache
from torrentlm.compute.chain import step
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.sizes import Point
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Split
from torrentlm.errors import RefusedError, RemoteProtocolError
from torrentlm.manifest.sidecar import MAX_BYTES, Recorded, Samples
from torrentlm.wire.tensors import Tensor

ROOM = MAX_BYTES * 3 // 4
"""Bytes for the borders of all sides; the rest is for the header and for what outputs and encoders add."""
OUTPUT_VALUES = 1024
TOKENS = (8, 4)
"""Of a sample: the first number that leaves room for all borders. With few tokens there is little to attend to."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is recorded: the borders ``positions``, for so many tokens, floating point values in ``dtype``."""

    positions: tuple[int, ...]
    tokens: int
    dtype: str


def choose(split: Split, positions: Sequence[int], dtype: str, room: int = ROOM) -> Choice:
    """What to record of the borders at ``positions`` in ``room`` bytes, where ``dtype`` is computed in.

    F32 is rounded to BF16 if there is no room for it. Where even the smallest sample is too much, pairs of neighbours
    are left out here and there.
    """
    kinds = ("F32", "BF16") if dtype == "F32" else (dtype,)
    for tokens, kind in [(TOKENS[0], kinds[0]), *((tokens, kinds[-1]) for tokens in TOKENS)]:
        sizes = [_border_bytes(split, at, tokens, DTYPES[kind].itemsize) for at in positions]
        if sum(sizes) <= room:
            return Choice(tuple(positions), tokens, kind)
    pairs = room // (2 * max(sizes))
    starts = [number * (len(positions) - 1) // pairs for number in range(pairs)]
    kept = sorted({positions[at] for start in starts for at in (start, start + 1)})
    return Choice(tuple(kept), TOKENS[-1], kinds[-1])


def _border_bytes(split: Split, position: int, tokens: int, itemsize: int) -> int:
    """About what a border takes: an axis of unknown size counts as one, and tensors without a point as 8 bytes each."""
    point = Point(1, tokens, source=tokens)
    return sum(
        math.prod(size or 1 for size in tensor.at(point)) * (itemsize if tensor.dtype.is_floating_point else 8)
        for tensor in split.borders[position].tensors
    )


def record(
    tokens: torch.Tensor,
    borders: Mapping[int, tuple[torch.Tensor, ...]],
    output: torch.Tensor,
    encoded: Encoded | None,
    dtype: str,
) -> Samples:
    """The sample of a text: ``tokens`` int [n], its ``borders`` by position, what the model made of its last token, and
    what an encoder had made of another text.

    ``output`` is taken in F32; of the other tensors floating point ones are rounded to ``dtype``.
    """
    flat = output.float().reshape(-1)
    stride = -(-flat.numel() // OUTPUT_VALUES)
    return Samples(
        tuple(tokens.tolist()),
        {at: tuple(_recorded(tensor, dtype) for tensor in border) for at, border in borders.items()},
        _recorded(flat[::stride], "F32"),
        stride,
        () if encoded is None else (_recorded(encoded.states, dtype),),
    )


@dataclass(frozen=True, slots=True)
class Check:
    """``share`` of a sample's values (0 to 1) came out otherwise than recorded; ``limit`` of them may."""

    share: float
    limit: float

    @property
    def good(self) -> bool:
        return self.share <= self.limit


def check(runner: SpanRunner, samples: Samples) -> Check | None:
    """Run the sample through one part and compare. None where the sample has nothing for it, or nothing that fits."""
    ids = torch.tensor([samples.tokens])
    begin = () if runner.has_stem else samples.borders.get(runner.layers.start)
    due = (samples.output,) if runner.has_head else samples.borders.get(runner.layers.stop)
    if begin is None or due is None:
        return None
    given = (pack(ids),) if runner.has_stem else tuple(map(_tensor, begin))
    try:
        made = step(runner, _session(runner, samples), given, ids.shape[1])
        found = [unpack(tensor) for tensor in made]
        before = [unpack(_tensor(tensor)) for tensor in begin]
        expected = [unpack(_tensor(tensor)) for tensor in due]
    except (RemoteProtocolError, RefusedError):
        return None
    if runner.has_head:
        found = [found[0].reshape(-1)[:: samples.stride]]
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return None
    allowed = _ALLOWED[max(DTYPE_NAMES[runner.dtype], _precision(begin), key=list(_ALLOWED).index)]
    pairs = zip_longest(found, expected, before[: len(found)])
    wrong = sum(_wrong(ours, theirs, earlier, allowed) for ours, theirs, earlier in pairs)
    return Check(wrong / max(1, sum(tensor.numel() for tensor in expected)), allowed.share)


def _session(runner: SpanRunner, samples: Samples) -> SpanCache:
    cache = runner.open(1, len(samples.tokens))
    if samples.encoded:
        [states] = (unpack(_tensor(tensor)) for tensor in samples.encoded)
        source = states.shape[1] if states.dim() > 1 else 0
        cache.encoded = runner.encoded(cache, source, (states, torch.ones(1, source, dtype=torch.long)))
    return cache


@dataclass(frozen=True, slots=True)
class _Allowed:
    """A value may be off by ``own`` of itself + ``change`` of what the block changes a value by (the median).

    ``share`` of the values may be off by more: in low precision, a token that lies between two experts goes to another.
    """

    own: float
    change: float
    share: float


_ALLOWED = {
    "F64": _Allowed(1e-5, 1e-3, 0.01),
    "F32": _Allowed(1e-5, 1e-3, 0.01),
    "F16": _Allowed(2**-9, 2**-5, 0.1),
    "BF16": _Allowed(2**-7, 2**-4, 0.1),
}
"""From the finest to the coarsest."""


def _precision(border: Sequence[Recorded]) -> str:
    """What the floating point values of a border were rounded to."""
    return next((tensor.dtype for tensor in border if tensor.dtype in _ALLOWED), "F32")


def _wrong(ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor | None, allowed: _Allowed) -> int:
    """In how many values the two differ by more than is allowed."""
    if not theirs.is_floating_point() or not theirs.numel():
        return int((ours != theirs).sum())
    ours, theirs = ours.float(), theirs.float()
    is_changed = before is not None and before.is_floating_point() and before.shape == theirs.shape
    change = (theirs - before.float()) if is_changed and before is not None else theirs
    bound = theirs.abs() * allowed.own + change.abs().median() * allowed.change
    within = ((ours - theirs).abs() <= bound) | (ours.isnan() & theirs.isnan())
    return int((~within).sum())


def _recorded(tensor: torch.Tensor, dtype: str) -> Recorded:
    packed = pack(tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor)
    return Recorded(packed.dtype, packed.shape, bytes(packed.data))


def _tensor(recorded: Recorded) -> Tensor:
    return Tensor(recorded.dtype, recorded.shape, recorded.data)
