"""Borders: what one layer call returns and the next holder needs, as plain values that travel.

A border is a tree (tuples, lists, dicts, constants) with tensors at some leaves. ``flatten`` takes it apart into
the tensors and a tree of plain values, ``rebuild`` puts it together again; ``to_wire`` and ``from_wire`` turn it into
what a message carries and back.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torrentlm.errors import RemoteProtocolError, UnsupportedModelError
from torrentlm.wire.tensors import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TENSOR, TUPLE, LIST, DICT, CONSTANT = 0, 1, 2, 3, 4
BATCH, TOKENS = -1, -2
"""Stand for the batch size and the number of tokens of a step among the sizes of a BorderShape."""

MAX_DEPTH = 8
ALIGNMENT = 64  # bytes; torch's own allocations on the CPU

Place = tuple[int | str, ...]
"""Where a tensor hangs in nested tuples, lists and dicts: the indices and keys from the top down."""


@dataclass(frozen=True, slots=True)
class Border:
    """What a layer call returned: its tensors in order, and the tree they hang in (``None``: one bare tensor)."""

    tensors: tuple[torch.Tensor, ...]
    tree: Any = None

    @classmethod
    def of(cls, value: Any) -> Border:
        """The border that a layer call's return value makes."""
        tensors, tree = flatten(value)
        return cls(tuple(tensors), tree)

    @property
    def value(self) -> Any:
        """The return value again; only for a tree of our own or one that ``BorderShape.check`` has accepted."""
        return rebuild(self.tensors, self.tree)


@dataclass(frozen=True, slots=True)
class Logits:
    """float [batch, n, vocabulary]: of the last position, of all, or (after a step of no tokens) of none."""

    logits: torch.Tensor


@dataclass(frozen=True)
class BorderShape:
    """What a border looks like: tree, shapes, dtypes (where a floating point dtype stands for any such)."""

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = field(default=())

    @classmethod
    def between(
        cls, small: BorderShape, sizes: tuple[int, int], large: BorderShape, larger: tuple[int, int]
    ) -> BorderShape:
        """One shape for all sizes, from what was seen at two: ``sizes`` and ``larger`` are (batch, tokens)."""
        if small.tree != large.tree or small.dtypes != large.dtypes or len(small.shapes) != len(large.shapes):
            raise UnsupportedModelError("What the layers return changes its structure with the number of tokens.")
        axes = {(a, b): name for a, b, name in zip(sizes, larger, (BATCH, TOKENS), strict=True)}
        shapes = []
        for one, other in zip(small.shapes, large.shapes, strict=True):
            if len(one) != len(other):
                raise UnsupportedModelError("What the layers return changes its structure with the number of tokens.")
            shape = []
            for a, b in zip(one, other, strict=True):
                if a != b and (a, b) not in axes:
                    raise UnsupportedModelError("What the layers return grows by another rule than batch and tokens.")
                shape.append(a if a == b else axes[a, b])
            shapes.append(tuple(shape))
        if not any(TOKENS in shape for shape in shapes):
            raise UnsupportedModelError("What the layers return does not grow with the number of tokens.")
        return cls(small.tree, tuple(shapes), small.dtypes)

    def at(self, batch: int, tokens: int) -> BorderShape:
        """The shape with all sizes known: a step of ``tokens`` new tokens in each of ``batch`` rows."""
        known = {BATCH: batch, TOKENS: tokens}
        shapes = tuple(tuple(known.get(size, size) for size in shape) for shape in self.shapes)
        return BorderShape(self.tree, shapes, self.dtypes)

    def tokens_of(self, border: Border) -> int:
        """How many new tokens per row a peer's border is for; RemoteProtocolError if it cannot be told."""
        for tensor, shape in zip(border.tensors, self.shapes, strict=False):
            if TOKENS in shape and tensor.dim() == len(shape):
                return tensor.shape[shape.index(TOKENS)]
        raise RemoteProtocolError("The peer's activations have another shape than this model's layers return.")

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Border:
        """A border of these known sizes, its floating point tensors in ``dtype``."""
        kinds = (dtype if kind.is_floating_point else kind for kind in self.dtypes)
        tensors = (torch.zeros(size, dtype=kind, device=device) for size, kind in zip(self.shapes, kinds, strict=True))
        return Border(tuple(tensors), self.tree)

    def check(self, border: Border) -> None:
        """Raise RemoteProtocolError unless a peer's border has this tree, these known sizes and fitting dtypes."""
        if border.tree != self.tree:
            raise RemoteProtocolError("The peer's activations have another structure than this model's layers return.")
        if len(border.tensors) != len(self.shapes):
            raise RemoteProtocolError(f"The peer sent {len(border.tensors)} tensors where {len(self.shapes)} are due.")
        for tensor, kind, size in zip(border.tensors, self.dtypes, self.shapes, strict=True):
            fits = tensor.dtype.is_floating_point if kind.is_floating_point else tensor.dtype == kind
            if not fits or tuple(tensor.shape) != size:
                raise RemoteProtocolError(
                    f"The peer sent {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} where {list(size)} is due."
                )


def shape_of(tensors: Sequence[torch.Tensor], tree: Any) -> BorderShape:
    """The shape as seen, with plain numbers for all sizes."""
    return BorderShape(
        tree, tuple(tuple(tensor.shape) for tensor in tensors), tuple(tensor.dtype for tensor in tensors)
    )


def flatten(value: Any) -> tuple[list[torch.Tensor], Any]:
    """Take a layer's return value apart; raises UnsupportedModelError for what cannot travel."""
    tensors: list[torch.Tensor] = []

    def walk(part: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnsupportedModelError("The layers return values nested too deeply to be sent on.")
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            return [TENSOR, len(tensors) - 1]
        if type(part) is tuple or type(part) is list:
            return [TUPLE if type(part) is tuple else LIST, [walk(item, depth + 1) for item in part]]
        if type(part) is dict and all(isinstance(key, str) for key in part):
            return [DICT, list(part), [walk(item, depth + 1) for item in part.values()]]
        if part is None or isinstance(part, bool | int | float | str):
            return [CONSTANT, part]
        raise UnsupportedModelError(
            f"The layers return a {type(part).__name__}, which cannot be sent to another holder."
        )

    if isinstance(value, torch.Tensor):
        return [value], None
    tree = walk(value, 0)
    return tensors, tree


def rebuild(tensors: Sequence[torch.Tensor], tree: Any) -> Any:
    """What ``flatten`` took apart; the tree must be one that ``BorderShape.check`` has accepted."""
    if tree is None:
        return tensors[0]
    kind, *rest = tree
    if kind == TENSOR:
        return tensors[rest[0]]
    if kind == CONSTANT:
        return rest[0]
    if kind == DICT:
        return dict(zip(rest[0], (rebuild(tensors, item) for item in rest[1]), strict=True))
    items = [rebuild(tensors, item) for item in rest[0]]
    return tuple(items) if kind == TUPLE else items


def pack(tensor: torch.Tensor) -> Tensor:
    """A tensor as it travels, a view of a contiguous one on the CPU: leave it unchanged until the bytes are sent."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return Tensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


def unpack(packed: Tensor) -> torch.Tensor:
    """The tensor that a peer sent, if possible a view of the message; RemoteProtocolError if its parts do not fit."""
    dtype = DTYPES.get(packed.dtype)
    if dtype is None:
        raise RemoteProtocolError(f"The peer sent a tensor of dtype {packed.dtype}, which nothing here computes with.")
    count = math.prod(packed.shape)
    if min(packed.shape, default=0) < 0 or count * dtype.itemsize != len(packed.data):
        raise RemoteProtocolError(f"The peer sent {len(packed.data)} bytes for {packed.dtype} {list(packed.shape)}.")
    if count == 0:
        return torch.empty(packed.shape, dtype=dtype)
    if dtype is torch.bool:  # any other byte than 0 and 1 would be undefined behaviour in torch
        return view_of(packed.data, torch.uint8, count).ne(0).view(packed.shape)
    return aligned(view_of(packed.data, dtype, count)).view(packed.shape)


def to_wire(result: Border | Logits) -> tuple[tuple[Tensor, ...], Any]:
    """A forward's result as the tensors and the tree of a message."""
    if isinstance(result, Logits):
        return (pack(result.logits),), None
    return tuple(pack(tensor) for tensor in result.tensors), result.tree


def from_wire(tensors: Sequence[Tensor], tree: Any, expected: BorderShape | None) -> torch.Tensor | Border:
    """What a step brought, for ``SpanRunner.forward``: ids where ``expected`` (its ``expects``) is None, else a border.

    Raises RemoteProtocolError for a number of tensors, a shape or a dtype that the span cannot take.
    """
    if expected is None:
        if len(tensors) != 1 or tensors[0].dtype not in ("I32", "I64"):
            raise RemoteProtocolError("A step for the stem brings one tensor of token ids.")
        return unpack(tensors[0])
    if len(tensors) != len(expected.shapes):
        raise RemoteProtocolError(f"The peer sent {len(tensors)} tensors where {len(expected.shapes)} are due.")
    border = Border(tuple(unpack(tensor) for tensor in tensors), tree)
    expected.check(border)
    return border


def view_of(
    data: bytes | bytearray | memoryview | mmap.mmap, dtype: torch.dtype, count: int, offset: int = 0
) -> torch.Tensor:
    """A flat tensor over the bytes in ``data``, which nothing may write to."""
    with warnings.catch_warnings():  # torch warns where the bytes are read-only
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where torch itself would have put them. Matrix products round differently at odd addresses."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def to_dtype(border: Border, dtype: torch.dtype, device: torch.device) -> Border:
    """The border on ``device``, its floating point tensors in ``dtype``; what is so already is not copied."""
    moved = (
        tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in border.tensors
    )
    return Border(tuple(moved), border.tree)


def tensors_at(value: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every tensor in nested tuples, lists and dicts with its place; anything else is passed over."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif len(place) < MAX_DEPTH and type(value) in (tuple, list):
        for index, item in enumerate(value):
            yield from tensors_at(item, (*place, index))
    elif len(place) < MAX_DEPTH and type(value) is dict:
        for key, item in value.items():
            yield from tensors_at(item, (*place, key))


def replace_at(value: Any, replacements: Mapping[Place, torch.Tensor]) -> Any:
    """A copy of nested tuples, lists and dicts with other tensors at some places."""
    if () in replacements:
        return replacements[()]
    if not replacements:
        return value
    below: dict[int | str, dict[Place, torch.Tensor]] = {}
    for place, tensor in replacements.items():
        below.setdefault(place[0], {})[place[1:]] = tensor
    if isinstance(value, dict):
        return {key: replace_at(item, below.get(key, {})) for key, item in value.items()}
    return type(value)(replace_at(item, below.get(index, {})) for index, item in enumerate(value))
