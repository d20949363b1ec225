"""Blocks whose weights stay in the processor's memory and come to the device when it is their turn.

The device has two slabs, each as large as the largest of these blocks; the n-th of them runs out of slab n % 2. The
model's tensors are views of its slab that never change, so a step points nothing elsewhere: only bytes move. While one
block computes, the next one's bytes come into the other slab, and as soon as a block is done, its slab is filled with
what ran after it the last time; behind the last block that is the first one, for the next token.

On CUDA copies run on a stream of their own out of locked pages, and events keep them and what is computed in order.
Anywhere else a copy is a copy. What a model's code changes in its weights in place is lost when their bytes come again.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from torrentlm.compute.precision import BOUNDARY
from torrentlm.compute.quantization.packed import Packed
from torrentlm.compute.quantization.tensor import QuantizedTensor, moved
from torrentlm.route.assign import SLABS

log = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # torch says nothing of these types
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU


class HostBlock:
    """One block's weights, packed into ``size`` bytes of the processor's memory. Its tensors are taken one by one.

    ``place``: which of the device's offloaded blocks it is; ``layers``: the layer calls that need it. ``dtypes`` are
    those that the model's code has its weights in; one that comes in another, or for which there is no room, goes to
    ``device`` now and stays there.
    """

    def __init__(
        self,
        place: int,
        layers: range,
        tensors: Iterable[tuple[str, torch.Tensor]],
        size: int,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        self.place = place
        self.layers = layers
        self.bytes = _pages(size)
        self.used = 0
        self.staying: dict[str, torch.Tensor] = {}
        self._laid: dict[str, _Laid] = {}
        for name, tensor in tensors:
            laid, end = _lay(tensor, self.used)
            if laid is None or dtypes.get(name) != tensor.dtype or end > size:
                self.staying[name] = moved(tensor, device)
                continue
            for kept, part in zip(laid.parts, _parts(tensor), strict=True):
                kept.within(self.bytes).copy_(part)
            self._laid[name], self.used = laid, end
        if device.type == "cuda":
            _lock(self, self.bytes, device)

    def within(self, slab: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its tensors by their names in the model, as views of ``slab``, and those that stay on the device."""
        return {name: laid.within(slab) for name, laid in self._laid.items()} | self.staying


@dataclass(frozen=True, slots=True)
class _Part:
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int

    def within(self, pages: torch.Tensor) -> torch.Tensor:
        flat = pages[self.offset : self.offset + self.size].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class _Laid:
    """Where a tensor lies; ``form``: as a quantized one without its values, None for any other."""

    parts: tuple[_Part, ...]
    form: tuple[Packed, torch.dtype, bool] | None

    def within(self, pages: torch.Tensor) -> torch.Tensor:
        if self.form is None:
            return self.parts[0].within(pages)
        (packed, dtype, turned), (codes, scales) = self.form, (part.within(pages) for part in self.parts)
        return QuantizedTensor(replace(packed, codes=codes, scales=scales), dtype, turned)


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not isinstance(tensor, QuantizedTensor):
        return (tensor,)
    return (tensor.packed.codes, tensor.packed.scales) if isinstance(tensor.packed, Packed) else ()


def _lay(tensor: torch.Tensor, offset: int) -> tuple[_Laid | None, int]:
    """Where a tensor goes, from ``offset`` on, and where it ends; None for one of a kind that is not known here."""
    parts = []
    for part in _parts(tensor):
        alike = torch.empty_like(part, device="meta")  # dense, in the same order where that is possible
        parts.append(_Part(offset, tuple(alike.shape), alike.stride(), alike.dtype, alike.nbytes))
        offset += -(-alike.nbytes // BOUNDARY) * BOUNDARY
    form = None
    if isinstance(tensor, QuantizedTensor) and isinstance(tensor.packed, Packed):
        nothing = torch.empty(0)
        form = (replace(tensor.packed, codes=nothing, scales=nothing), tensor.dtype, tensor.turned)
    return (_Laid(tuple(parts), form) if parts else None), offset


def _pages(size: int) -> torch.Tensor:
    """Pages of their own, which the driver can lock one block at a time, and which go back to the system."""
    made = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(made, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)


def _lock(owner: HostBlock, pages: torch.Tensor, device: torch.device) -> None:
    """Have the driver lock ``pages`` as long as ``owner`` lives, so that copies from them run beside everything else.

    torch's own pinned memory comes in powers of two, up to twice what was asked for; these bytes are counted.
    """
    runtime = _cuda.cudart()
    if failed := int(runtime.cudaHostRegister(pages.data_ptr(), pages.nbytes, _PORTABLE)):
        log.warning("%d bytes cannot be locked (CUDA error %d): copies of them are slower", pages.nbytes, failed)
        with suppress(RuntimeError):  # the driver tells whoever asks next, and only once
            torch.ones(1, device=device).sum().item()
        return

    def unlock() -> None:
        with suppress(RuntimeError, AssertionError):  # a device that is lost has nothing on its way
            _cuda.synchronize(device)
        runtime.cudaHostUnregister(pages.data_ptr())  # and only then the pages may go

    weakref.finalize(owner, unlock).atexit = False


class Copies(Protocol):
    """Copies into the slabs, in order with what is computed."""

    def start(self, slab: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy into slab number ``slab`` once what was computed out of it is done; return at once where possible."""

    def wait(self, slab: int) -> None:
        """What is computed from now on finds there what was last copied."""

    def used(self, slab: int) -> None:
        """What was computed up to now was the last to need what is there."""


class Immediate:
    """Copies that are done at once: in the order in which things are asked for, all is in order."""

    def start(self, slab: int, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, slab: int) -> None:
        pass

    def used(self, slab: int) -> None:
        pass


class Streamed:
    """Copies on a stream of their own, beside what is computed on the current one of whoever calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _cuda.Stream(device)
        self._stream.wait_stream(_cuda.current_stream(device))  # the slabs' memory may still be in use there
        self._copied = [_cuda.Event() for _ in range(SLABS)]
        self._used = [_cuda.Event() for _ in range(SLABS)]

    def start(self, slab: int, target: torch.Tensor, source: torch.Tensor) -> None:
        self._stream.wait_event(self._used[slab])
        with _cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied[slab].record(self._stream)
        target.record_stream(self._stream)

    def wait(self, slab: int) -> None:
        _cuda.current_stream(self._device).wait_event(self._copied[slab])

    def used(self, slab: int) -> None:
        self._used[slab].record(_cuda.current_stream(self._device))


class Stage:
    """The two slabs of one device, of ``slab`` bytes each, for the offloaded blocks of one model.

    The spans of a model share it. One forward at a time may use it: whoever runs one holds its ``turn``.
    """

    def __init__(self, device: torch.device, slab: int, copies: Copies | None = None) -> None:
        self._slabs = tuple(torch.empty(slab, dtype=torch.uint8, device=device) for _ in range(SLABS))
        self._copies = copies or (Streamed(device) if device.type == "cuda" else Immediate())
        self._there: list[HostBlock | None] = [None] * SLABS
        self._last: list[int | None] = [None] * SLABS
        self._computing: set[int] = set()
        self._after: dict[int, int] = {}
        self._blocks: weakref.WeakValueDictionary[int, HostBlock] = weakref.WeakValueDictionary()
        self._turn = threading.Lock()

    def tensors(self, block: HostBlock) -> dict[str, torch.Tensor]:
        """The weights of ``block`` under the model's names, on the device: what they say there, they say from ``bring``
        to ``done``."""
        self._blocks[block.place] = block
        return block.within(self._slabs[block.place % SLABS])

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else uses the slabs meanwhile."""
        with self._turn:
            try:
                yield
            finally:  # a forward that failed half-way has computed with them all the same
                for slab in self._computing:
                    self._copies.used(slab)
                self._computing.clear()

    def bring(self, block: HostBlock) -> None:
        """What is computed from now on finds the weights of ``block`` in their slab."""
        slab = block.place % SLABS
        if (last := self._last[slab]) is not None:
            self._after[last] = block.place
        if self._there[slab] is not block:
            self._start(slab, block)
        self._copies.wait(slab)
        self._last[slab] = block.place
        self._computing.add(slab)
        other = (slab + 1) % SLABS
        if self._there[other] is None and (beside := self._next(block.place, other)) is not None:
            self._start(other, beside)  # nobody has been there to say what follows

    def done(self, block: HostBlock) -> None:
        """Nothing more is computed with ``block`` in this forward: what is expected next may come into its slab."""
        slab = block.place % SLABS
        self._copies.used(slab)
        self._computing.discard(slab)
        following = self._following(block.place)
        if following is not None and self._there[slab] is not following:
            self._start(slab, following)

    def forget(self, places: Collection[int]) -> None:
        """The blocks at these places go; nobody runs them. Waits for no turn: at worst something is copied twice."""
        for place in places:
            self._blocks.pop(place, None)
            slab = place % SLABS
            if (there := self._there[slab]) is not None and there.place == place:
                self._there[slab] = None

    def _start(self, slab: int, block: HostBlock) -> None:
        self._there[slab] = None  # whatever goes wrong
        self._copies.start(slab, self._slabs[slab][: block.used], block.bytes[: block.used])
        self._there[slab] = block

    def _following(self, place: int) -> HostBlock | None:
        """What will need this block's slab next: what did the last time, at first the next one, in a ring."""
        known = self._blocks.get(self._after.get(place, -1))
        return self._next(place, place % SLABS) if known is None else known

    def _next(self, place: int, slab: int) -> HostBlock | None:
        """The first block behind ``place``, in a ring, that runs out of ``slab``."""
        others = [other for other in list(self._blocks) if other % SLABS == slab]
        return self._blocks.get(min(others, key=lambda other: (other <= place, other))) if others else None


@dataclass(frozen=True, slots=True)
class Offload:
    """What of a span is offloaded: ``blocks`` by the names of their files."""

    stage: Stage
    blocks: Mapping[str, HostBlock]


class Turns:
    """When the layer calls of one span need which offloaded block. Without ``offload``: none does.

    A block comes before what the model computes in front of its first layer: that may read its weights, too.
    """

    def __init__(self, offload: Offload | None, first: int) -> None:
        self._stage = None if offload is None else offload.stage
        blocks = () if offload is None else tuple(offload.blocks.values())
        self._first = first
        self._begins = {block.layers.start: block for block in blocks}
        self._ends = {block.layers.stop: block for block in blocks}

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward."""
        if self._stage is None:
            yield
            return
        with self._stage.turn():
            self._pass(self._first)
            yield

    def behind(self, layer: int) -> None:
        """This layer call has computed what it does."""
        if self._stage is not None:
            self._pass(layer + 1)

    def _pass(self, layer: int) -> None:
        """All is computed that comes before ``layer``."""
        if self._stage is None:
            return
        if block := self._ends.get(layer):
            self._stage.done(block)
        if block := self._begins.get(layer):
            self._stage.bring(block)
