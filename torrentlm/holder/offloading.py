"""The blocks of a held model that stay in the processor's memory: what they take there and on the device, and how they
get there.

Which these are was decided before (route/assign.py): blocks of layers, each with one file that no other block has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from weakref import ReferenceType, WeakValueDictionary, ref

import torch

from torrentlm.compute.offload import SLABS, HostBlock, Offload, Stage, packed_bytes
from torrentlm.holder.memory import Unit, UnitKey
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Span

Load = Callable[[int], Iterable[tuple[str, torch.Tensor]]]
"""A block's weights under the model's names, in the processor's memory."""


def offloadable(manifest: Manifest, sizes: Mapping[str, int], span: Span) -> dict[int, int]:
    """The blocks of ``span`` that can be offloaded, and the bytes that each takes then; ``sizes`` by a file's name."""
    users: dict[str, int] = {}
    for block in range(len(manifest.blocks)):
        for file in manifest.block_files(block):
            users[file.name] = users.get(file.name, 0) + 1
    found = {}
    for block in span:
        files = manifest.block_files(block)
        if manifest.blocks[block].kind == "layers" and len(files) == 1 and users[files[0].name] == 1:
            tensors = len(manifest.layouts[files[0].layout].specs)
            found[block] = packed_bytes(sizes[files[0].name], tensors)
    return found


class Offloading:
    """``blocks`` of a model's span, in their order. ``form`` says what a file is kept in, ``load`` brings the weights,
    ``dtypes`` are the model's own of its weights, by name.

    Whoever owns the memories keeps what is loaded; here it is only known.
    """

    def __init__(
        self,
        id: bytes,
        manifest: Manifest,
        blocks: Sequence[int],
        sizes: Mapping[str, int],
        device: torch.device,
        form: Callable[[str], str],
        load: Load,
        dtypes: Callable[[], Mapping[str, torch.dtype]],
    ) -> None:
        self.blocks = tuple(blocks)
        self._manifest = manifest
        self._device = device
        self._form = form
        self._load = load
        self._dtypes = dtypes
        known = offloadable(manifest, sizes, Span(self.blocks[0], self.blocks[-1])) if self.blocks else {}
        self._bytes = {block: known[block] for block in self.blocks}
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
        places = [place for place, block in enumerate(self.blocks) if self._key(block) in keys]
        if stage is not None and (places or self._slabs.key in keys):
            stage.forget(places)

    def _file(self, block: int) -> str:
        return self._manifest.block_files(block)[0].name

    def _key(self, block: int) -> UnitKey:
        """Another than that of the same file in a device's memory."""
        name = self._file(block)
        return name, f"{self._form(name)}, offloaded"

    def _make_stage(self) -> Stage:
        stage = Stage(self._device, self._slab)
        self._stage = ref(stage)
        return stage

    def _load_block(self, place: int, block: int) -> HostBlock:
        layers = self._manifest.blocks[block].layers
        calls = range(0) if layers is None else range(layers.first, layers.last + 1)
        made = HostBlock(place, calls, self._load(block), self._bytes[block], self._dtypes(), self._device)
        self._host[place] = made
        return made
