"""A model as far as this node holds it: the files of one span, and runners for the span and for any part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torrentlm.compute.border import DTYPES
from torrentlm.compute.chain import hints_of, part_of, require_same_cut
from torrentlm.compute.samples import check
from torrentlm.compute.skeleton import read_config
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Split
from torrentlm.compute.splitter import analyse_sides
from torrentlm.compute.tokenizer import load_tokenizer
from torrentlm.errors import RefusedError
from torrentlm.manifest.manifest import Manifest
from torrentlm.manifest.sidecar import Sidecar
from torrentlm.records import Span

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
    """``paths`` are the complete block files by name; ``precision`` is the safetensors dtype to compute in;
    ``allow_code`` are the hashes of models' own code that may run.

    The constructor loads the whole span. Blocks; run it in a thread. Raises ArtifactError, UnsupportedModelError.
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
    ) -> None:
        self.id = id
        self.manifest = manifest
        self.span = span
        self.precision = precision
        self.device = torch.device(device)
        self._folder = folder
        self._paths = dict(paths)
        self._config: Any = read_config(folder, allow_code)
        self._sides: tuple[Split, ...] = analyse_sides(self._config, hints_of(manifest))
        require_same_cut(manifest, self._sides)
        self._runners: OrderedDict[Span, SpanRunner] = OrderedDict()
        for side in range(len(manifest.sides)):
            blocks = manifest.side_blocks(side)
            if span.first <= blocks.last and blocks.first <= span.last:
                self.runner(Span(max(span.first, blocks.first), min(span.last, blocks.last)))

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens that the model is made for, if its config says."""
        limit = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder)

    def runner(self, span: Span) -> SpanRunner:
        """What runs ``span``. Raises RefusedError if it is not all here."""
        if span.first not in self.span or span.last not in self.span:
            raise RefusedError(f"this holder has blocks {self.span}, not {span}", "no_block")
        runner = self._runners.get(span)
        if runner is None:
            runner = self._runners[span] = self._build(span)
            while len(self._runners) > MAX_RUNNERS:
                self._runners.popitem(last=False)
        self._runners.move_to_end(span)
        return runner

    def is_decoder(self, span: Span) -> bool:
        """Whether these blocks are of an encoder-decoder's decoder."""
        return self.manifest.side_of(span.first) > 0

    def split_of(self, block: int) -> Split:
        """How the side that a block belongs to is cut."""
        return self._sides[self.manifest.side_of(block)]

    def recheck(self, sidecar: Sidecar) -> Rechecked | None:
        """Compare one block with what the sidecar recorded; None if it has nothing for any block here. Blocks.

        Only where a block differs others are tried, and one that does not is enough: in low precision a block may round
        a token to another side, but wrong code computes every block wrong.
        """
        found = None
        tried = 0
        for block in sorted(self.span, key=lambda block: self.manifest.blocks[block].kind != "layers"):
            side = self.manifest.side_of(block)
            if side >= len(sidecar.samples):
                continue
            checked = check(self._build(Span(block, block)), sidecar.samples[side])
            if checked is not None:
                tried += 1
                found = Rechecked(block, checked.share, checked.good) if found is None or checked.good else found
                if checked.good or tried == RECHECK_BLOCKS:
                    break
        return found

    def _build(self, span: Span) -> SpanRunner:
        manifest = self.manifest
        if manifest.side_of(span.first) != manifest.side_of(span.last):
            raise RefusedError(
                f"blocks {span} belong to the encoder and the decoder: a hop has those of one", "no_block"
            )
        part = part_of(manifest, span, self._paths)
        return part.runner(self._config, self.split_of(span.first), DTYPES[self.precision], self.device)
