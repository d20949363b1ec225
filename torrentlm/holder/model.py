"""A model as far as this node holds it: the files of one span, and runners for the span and for any part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from torrentlm.compute.border import DTYPES
from torrentlm.compute.chain import hints_of, part_of, require_same_cut
from torrentlm.compute.conversion import convert_all
from torrentlm.compute.overflow import overflows
from torrentlm.compute.precision import Precisions, file_forms
from torrentlm.compute.quantization.recipe import matrices as matrices_of
from torrentlm.compute.samples import check
from torrentlm.compute.skeleton import build_skeleton, read_config
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Split, named_weights
from torrentlm.compute.splitter import analyse_sides
from torrentlm.compute.tokenizer import load_tokenizer
from torrentlm.compute.weights import (
    BlockWeights,
    Convert,
    How,
    Quantization,
    QuantizedWeights,
    load_block,
    load_quantized,
    read_block,
)
from torrentlm.errors import RefusedError
from torrentlm.holder.memory import Unit, UnitKey
from torrentlm.holder.offloading import Offloading
from torrentlm.manifest.manifest import Manifest
from torrentlm.manifest.sidecar import Sidecar
from torrentlm.records import Span, spans_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECHECK_BLOCKS = 3
"""Blocks that are compared with a recorded sample before they are said to be wrong."""
MAX_RUNNERS = 8
"""Routes may use different parts of the span; each part has a runner of its own, on the same mapped files."""


@dataclass(frozen=True, slots=True)
class Rechecked:
    """``share`` of the values that ``block`` computes differ from the recorded ones; ``good``: no more than may."""

    block: int
    share: float
    good: bool


class HeldModel:
    """``paths`` say where the block files lie, by name; ``precision`` is the safetensors dtype to compute in;
    ``allow_code`` are the hashes of models' own code that may run; ``sizes`` are the bytes that each file takes in
    memory, by its name, those on the disk if not given. ``arrived`` are the blocks of ``span`` whose files are
    complete, all if not given; others may arrive later. ``stored`` are the blocks that are kept in INT8 or INT4,
    ``quantized`` is the folder where these are kept on disk, if anywhere. ``offloaded`` are the blocks that stay in
    the processor's memory and come to the device when they run, and what each takes (holder/offloading.py).

    ``like`` holds other blocks of the same model: what both need to know of it is then worked out once.

    Weights are loaded when they are first needed. Whoever owns the device's memory says when they go (``let_go``).
    The constructor blocks; run it in a thread. Raises ArtifactError, UnsupportedModelError.
    """

    def __init__(
        self,
        id: bytes,
        manifest: Manifest,
        folder: Path,
        paths: Mapping[str, Path],
        span: Span,
        precision: str,
        device: torch.device | str = "cpu",
        allow_code: Collection[str] = (),
        sizes: Mapping[str, int] | None = None,
        arrived: Collection[int] | None = None,
        stored: Mapping[int, str] | None = None,
        quantized: Path | None = None,
        like: HeldModel | None = None,
        offloaded: Mapping[int, int] | None = None,
    ) -> None:
        self.id = id
        self.manifest = manifest
        self.span = span
        self.precisions = Precisions(precision, stored or {})
        self._forms = file_forms(manifest, self.precisions.stored)
        self._quantized = quantized
        self.device = torch.device(device)
        self._folder = folder
        self._paths = dict(paths)
        self._sizes = sizes or {file.name: file.size for file in manifest.files}
        self._config: Any = read_config(folder, allow_code) if like is None else like._config
        self._sides: tuple[Split, ...] = (
            analyse_sides(self._config, hints_of(manifest)) if like is None else like._sides
        )
        require_same_cut(manifest, self._sides)
        self.offloading = Offloading(
            id, manifest, offloaded or {}, self.device, self._form, self._load_aside, lambda: self._eligible[2]
        )
        self._arrived: set[int] = set(span if arrived is None else arrived)
        self._runners: OrderedDict[Span, SpanRunner] = OrderedDict()
        self._retired: WeakKeyDictionary[SpanRunner, Span] = WeakKeyDictionary()

    @property
    def arrived(self) -> Collection[int]:
        """The blocks that can be asked for."""
        return frozenset(self._arrived)

    def arrive(self, block: int) -> None:
        """The files of this block of the span are complete."""
        self._arrived.add(block)

    def units(self, span: Span) -> list[Unit]:
        """The block files of ``span``, each once, as the device's memory holds them, and what it needs for those that
        are offloaded. RefusedError if one is not here.
        """
        self._require(span)
        aside = self.offloading.names(span)
        names = [file.name for file in self.manifest.span_files(span.first, span.last) if file.name not in aside]
        files = [Unit(name, self._form(name), self._sizes[name], partial(self._load, name)) for name in names]
        return files + self.offloading.slabs(span)

    def units_aside(self, span: Span) -> list[Unit]:
        """The offloaded blocks of ``span``, as the processor's memory holds them. RefusedError if one is not here."""
        self._require(span)
        return self.offloading.units(span)

    def _form(self, name: str) -> str:
        """What a file's weights are kept in."""
        return self._forms.get(name, self.precisions.compute)

    def _load(self, name: str) -> list[BlockWeights | QuantizedWeights]:
        path, dtype = self._paths[name], DTYPES[self.precisions.compute]
        if name not in self._forms:
            return [load_block(path, dtype, self.device)]
        how, convert = self._how(name)
        names = {
            used.names
            for block in self.span
            for used in self.manifest.blocks[block].files
            if self.manifest.files[used.file].name == name
        }
        return [load_quantized(path, called, convert, how) for called in sorted(names)]

    def _load_aside(self, block: int) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights of a block with one file of its own."""
        [used] = self.manifest.blocks[block].files
        name = self.manifest.files[used.file].name
        how, convert = self._how(name, torch.device("cpu"))
        if name not in self._forms:
            return read_block(self._paths[name], used.names, convert, how.dtype)
        return load_quantized(self._paths[name], used.names, convert, how).tensors.items()

    def _how(self, name: str, keep_on: torch.device | None = None) -> tuple[How, Convert]:
        matrices, convert, _ = self._eligible
        dtype = DTYPES[self.precisions.compute]
        return How(self._form(name), matrices, dtype, self.device, self._quantized, keep_on), convert

    @cached_property
    def _eligible(self) -> tuple[Mapping[str, bool], Convert, Mapping[str, torch.dtype]]:
        """Which of the model's weights may be quantized, what makes them of a file's, as a runner has it, and what the
        model's code has each in."""
        model = build_skeleton(self._config, DTYPES[self.precisions.compute], self.device)
        dtypes = {name: tensor.dtype for name, tensor in named_weights(model)}
        return matrices_of(model), partial(convert_all, model, known=frozenset(dtypes)), dtypes

    def blocks_of(self, keys: Collection[UnitKey]) -> list[int]:
        """The blocks that can run with what is there: ``keys`` of the device's memory, and of the processor's."""
        names, aside = {name for name, form in keys if form == self._form(name)}, self.offloading
        return [
            block
            for block in self.span
            if (block in aside.blocks and aside.there(block, keys))
            or all(file.name in names for file in self.manifest.block_files(block))
        ]

    def let_go(self, keys: Collection[UnitKey]) -> None:
        """Drop what keeps these files in memory. No session uses them."""
        for span, runner in self._runners.items():
            self._retired[runner] = span
        for runner, span in list(self._retired.items()):
            if any(unit.key in keys for unit in (*self.units(span), *self.units_aside(span))):
                runner.close()
                self._runners.pop(span, None)
        self.offloading.let_go(keys)

    def _require(self, span: Span) -> None:
        if not self._arrived.issuperset(span):
            blocks = ", ".join(map(str, spans_of(self._arrived))) or "none"
            raise RefusedError(f"this holder has blocks {blocks} of that model, not {span}", "no_block")

    @property
    def precision(self) -> str:
        """What the blocks are kept in, as peers are told: ``BF16``, ``INT4``, ``BF16+INT4``."""
        return self.precisions.said(self.span)

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens that the model is made for, if its config says."""
        limit = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder)

    def warm_up(self) -> None:
        """Build the runners of the whole span, one for each side, if its weights are all in memory. Blocks."""
        for side in range(len(self.manifest.sides)):
            blocks = self.manifest.side_blocks(side)
            if self.span.first <= blocks.last and blocks.first <= self.span.last:
                self.runner(Span(max(self.span.first, blocks.first), min(self.span.last, blocks.last)))

    def runner(self, span: Span) -> SpanRunner:
        """What runs ``span``. Raises RefusedError if it is not all here."""
        self._require(span)
        runner = self._runners.get(span)
        if runner is None:
            runner = self._runners[span] = self._build(span)
            while len(self._runners) > MAX_RUNNERS:
                retired, old = self._runners.popitem(last=False)  # a session that uses it keeps it
                self._retired[old] = retired
        self._runners.move_to_end(span)
        return runner

    def is_decoder(self, span: Span) -> bool:
        """Whether these blocks are of an encoder-decoder's decoder."""
        return self.manifest.side_of(span.first) > 0

    def split_of(self, block: int) -> Split:
        """How the side that a block belongs to is cut."""
        return self._sides[self.manifest.side_of(block)]

    def worth_checking(self, blocks: Collection[int]) -> list[int]:
        """A few of ``blocks`` to compare with what was recorded, layers first: they have the most code of their own.

        Offloaded ones come last: as published they may need memory that they do not have on the device.
        """
        entries, aside = self.manifest.blocks, self.offloading.blocks
        return sorted(blocks, key=lambda block: (entries[block].kind != "layers", block in aside, block))[
            :RECHECK_BLOCKS
        ]

    def recheck(self, blocks: Sequence[int], sidecar: Sidecar) -> Rechecked | None:
        """Compare one of ``blocks`` with what the sidecar recorded; None if it has nothing for any of them. Blocks.

        Only where a block differs others are tried, and one that does not is enough: in low precision a block may round
        a token to another side, but wrong code computes every block wrong. What is compared is computed with the
        published weights, also where the block is kept in fewer bits: the sample knows nothing of what these lose.
        """
        found = None
        for block in blocks:
            side = self.manifest.side_of(block)
            if side >= len(sidecar.samples):
                continue
            checked = check(self._build(Span(block, block), exact=True), sidecar.samples[side])
            if checked is not None:
                found = Rechecked(block, checked.share, checked.good) if found is None or checked.good else found
                if checked.good:
                    break
        return found

    def overflowing(self, sidecar: Sidecar) -> tuple[int, ...]:
        """The blocks that F16 cannot hold, by the recorded samples, which are computed as published. Blocks.

        On the processor, where weights as published are mapped: no device's budget knows of this.
        """
        dtype = DTYPES[self.manifest.dtype] if self.manifest.dtype in ("F32", "BF16") else torch.float32
        found = []
        for block in self.span:
            side = self.manifest.side_of(block)
            if side < len(sidecar.samples):
                runner = self._build(Span(block, block), exact=True, computed=(dtype, torch.device("cpu")))
                if overflows(runner, sidecar.samples[side]):
                    found.append(block)
        return tuple(found)

    def _build(
        self, span: Span, exact: bool = False, computed: tuple[torch.dtype, torch.device] | None = None
    ) -> SpanRunner:
        """``exact``: with the published weights, whatever the blocks are kept in. ``computed``: in what and where, if
        not as blocks are served."""
        manifest = self.manifest
        if manifest.side_of(span.first) != manifest.side_of(span.last):
            raise RefusedError(
                f"blocks {span} belong to the encoder and the decoder: a hop has those of one", "no_block"
            )
        part = part_of(manifest, span, self._paths)
        dtype, device = computed or (DTYPES[self.precisions.compute], self.device)
        quantization = Quantization({} if exact else self._forms, self._quantized)
        offload = None if computed else self.offloading.of(span, self._forms if exact else ())
        return part.runner(self._config, self.split_of(span.first), dtype, device, quantization, offload)
