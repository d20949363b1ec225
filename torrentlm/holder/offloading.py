"""The blocks of a held model that stay in the processor's memory: what they take there and on the device, and how they
get there.

Which these are was decided before (``set_aside`` in route/assign.py): blocks of layers, each with one file that no
other block has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from weakref import ReferenceType, WeakValueDictionary, ref

import torch

from torrentlm.compute.device import memory_errors
from torrentlm.compute.offload import HostBlock, Offload, Stage
from torrentlm.holder.memory import Unit, UnitKey
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Span
from torrentlm.route.assign import SLABS

Load = Callable[[int], Iterable[tuple[str, torch.Tensor]]]
"""A block's weights under the model's names, in the processor's memory."""


class Offloading:
    """``blocks`` of a model's span, with the bytes that each takes. ``form`` says what a file is kept in, ``load``
    brings the weights, ``dtypes`` are the model's own of its weights, by name.

    Whoever owns the memories keeps what is loaded; here it is only known.
    """

    def __init__(
        self,
        id: bytes,
        manifest: Manifest,
        blocks: Mapping[int, int],
        device: torch.device,
        form: Callable[[str], str],
        load: Load,
        dtypes: Callable[[], Mapping[str, torch.dtype]],
    ) -> None:
        self.blocks = tuple(sorted(blocks))
        self._manifest = manifest
        self._device = device
        self._form = form
        self._load = load
        self._dtypes = dtypes
        self._bytes = dict(blocks)
        self._slab = max(self._bytes.values(), default=0)
        self._slabs = Unit(f"slabs of {id.hex()}", "", SLABS * self._slab, self._make_stage)
        self._stage: ReferenceType[Stage] | None = None
        self._host: WeakValueDictionary[int, HostBlock] = WeakValueDictionary()

    def bytes_of(self, block: int) -> int:
        """What comes to the device when this block runs."""
        return self._bytes[block]

    def names(self, span: Span) -> set[str]:
        """The files of ``span`` that are offloaded."""
        return {self._file(block) for block in self.blocks if block in span}

    def slabs(self, span: Span) -> list[Unit]:
        """What ``span`` needs of the device's memory for its offloaded blocks."""
        return [self._slabs] if any(block in span for block in self.blocks) else []

    def units(self, span: Span) -> list[Unit]:
        """The offloaded blocks of ``span`` as the processor's memory holds them."""
        return [
            Unit(*self._key(block), self._bytes[block], partial(self._load_block, place, block))
            for place, block in enumerate(self.blocks)
            if block in span
        ]

    def there(self, block: int, keys: Collection[UnitKey]) -> bool:
        """Whether this block can run with what is in both memories."""
        return self._slabs.key in keys and self._key(block) in keys

    def of(self, span: Span, but: Collection[str] = ()) -> Offload | None:
        """What a runner of ``span`` finds offloaded, leaving out the files ``but``; None if nothing."""
        stage = None if self._stage is None else self._stage()
        if stage is None:
            return None
        found = {
            self._file(block): host
            for place, block in enumerate(self.blocks)
            if block in span and self._file(block) not in but and (host := self._host.get(place)) is not None
        }
        return Offload(stage, found) if found else None

    def let_go(self, keys: Collection[UnitKey]) -> None:
        """These go; nobody runs them any more."""
        stage = None if self._stage is None else self._stage()
        if stage is not None:
            stage.forget([place for place, block in enumerate(self.blocks) if self._key(block) in keys])

    def _file(self, block: int) -> str:
        return self._manifest.block_files(block)[0].name

    def _key(self, block: int) -> UnitKey:
        """Another than that of the same file in a device's memory."""
        name = self._file(block)
        return name, f"{self._form(name)}, offloaded"

    def _make_stage(self) -> Stage:
        with memory_errors():
            stage = Stage(self._device, self._slab)
        self._stage = ref(stage)
        return stage

    def _load_block(self, place: int, block: int) -> HostBlock:
        layers = self._manifest.blocks[block].layers
        calls = range(0) if layers is None else range(layers.first, layers.last + 1)
        with memory_errors():
            made = HostBlock(place, calls, self._load(block), self._bytes[block], self._dtypes(), self._device)
        self._host[place] = made
        return made
