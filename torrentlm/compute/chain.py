"""Parts of a model one after the other in one process, as several holders run them: every border in its wire form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from torrentlm.compute.border import from_wire, pack, to_wire, unpack
from torrentlm.compute.cache import SpanCache
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.offload import Offload
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Hints, Split
from torrentlm.compute.weights import Names, Quantization
from torrentlm.errors import UnsupportedModelError
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Span
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor


def hints_of(manifest: Manifest) -> Hints:
    """What the publisher's analysis found, for that of a holder, which may run another version of this program."""
    stacks = tuple(side.layer_stack for side in manifest.sides)
    replay = manifest.blocks[-1].rewind == "replay"  # an encoder keeps no state anyway
    encoder, chunks = manifest.task == "encoder", manifest.sides[-1].chunks
    return Hints(stacks, encoder=encoder, replay=replay, chunks=chunks)


def require_same_cut(manifest: Manifest, sides: Sequence[Split]) -> None:
    """Raise UnsupportedModelError unless a model is cut as its publisher cut it: other libraries may find otherwise."""
    for number, (side, split) in enumerate(zip(manifest.sides, sides, strict=True)):
        blocks = manifest.side_blocks(number)
        entries = manifest.blocks[blocks.first : blocks.last + 1]
        rewinds = [split.rewind(entry.layers or ()) for entry in entries] if split.layers == side.layers else []
        if rewinds != [entry.rewind for entry in entries] or split.chunks != side.chunks:
            raise UnsupportedModelError(
                "this model is cut otherwise here than by its publisher: its blocks hold what another version of"
                " transformers made of it; install the version that torrentlm inspect shows"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive blocks of one side: their layers (none: an empty range where they would be) and their files."""

    layers: range
    has_stem: bool
    has_head: bool
    files: tuple[tuple[Path, Names], ...]

    def runner(
        self,
        config: PretrainedConfig,
        split: Split,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
        offload: Offload | None = None,
    ) -> SpanRunner:
        """What runs it. Raises as SpanRunner does."""
        return SpanRunner(
            config,
            split,
            self.layers.start,
            self.layers.stop - 1,
            has_stem=self.has_stem,
            has_head=self.has_head,
            weights=self.files,
            dtype=dtype,
            device=device,
            quantization=quantization,
            offload=offload,
        )


def part_of(manifest: Manifest, span: Span, paths: Mapping[str, Path]) -> Part:
    """The blocks of ``span``, all of one side; ``paths`` says where the files lie, by name."""
    entries = manifest.blocks[span.first : span.last + 1]
    layers = [entry.layers for entry in entries if entry.layers is not None]
    # A part of the stem alone ends before layer 0, one of the head alone begins behind the last.
    alone = 0 if entries[0].kind == "stem" else manifest.sides[manifest.side_of(span.first)].layers
    first = layers[0].first if layers else alone
    stop = layers[-1].last + 1 if layers else first
    files = ((paths[manifest.files[used.file].name], used.names) for entry in entries for used in entry.files)
    return Part(range(first, stop), entries[0].kind == "stem", entries[-1].kind == "head", tuple(files))


def step(
    runner: SpanRunner, cache: SpanCache, tensors: Sequence[Tensor], tokens: int, want: Want = Want.LOGITS_LAST
) -> tuple[Tensor, ...]:
    """One step of ``tokens`` new tokens per row through one part, from message to message.

    Raises RemoteProtocolError for what the part does not take, RefusedError.
    """
    given = from_wire(tensors, ids=runner.has_stem)
    return to_wire(runner.forward(cache, given, tokens, want=want))


class Chain:
    """One session over the parts of one side, of as many holders as there are ``runners``."""

    def __init__(
        self,
        runners: Sequence[SpanRunner],
        batch: int,
        max_length: int,
        pads: Sequence[int] = (),
        encoded: Encoded | None = None,
    ) -> None:
        self.hops = [(runner, runner.open(batch, max_length, pads, encoded)) for runner in runners]

    def step(self, ids: torch.Tensor, want: Want = Want.LOGITS_LAST) -> torch.Tensor:
        """Logits [batch, 1 or n, vocabulary] behind ``ids``, int [batch, n]; where none are wanted, or no part has the
        head, the first tensor of the last border.
        """
        tensors: tuple[Tensor, ...] = (pack(ids),)
        for runner, cache in self.hops:
            tensors = step(runner, cache, tensors, ids.shape[1], want)
        return unpack(tensors[0])

    def decode(self, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What greedy decoding adds to ``ids``, [batch, tokens], and the logits that each was picked from."""
        logits = [self.step(ids)[:, -1:]]
        picked = [logits[-1].argmax(-1)]
        while len(picked) < tokens:
            logits.append(self.step(picked[-1])[:, -1:])
            picked.append(logits[-1].argmax(-1))
        return torch.cat(picked, dim=1), torch.cat(logits, dim=1)
