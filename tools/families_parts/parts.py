"""The model under test, published and held as any other, and the spans that run it one after the other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from whole import Decoded

from torrentlm.compute.border import Logits, from_wire, pack, to_wire
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe
from torrentlm.holder.model import HeldModel
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

MAX_LENGTH = 64


def thirds(kind: str, folder: Path, hints: dict[str, Any]) -> list[list[SpanRunner]]:
    """Three spans for each side of the checkpoint in ``folder``/checkpoint, published and held as any other.

    Raises what publishing and holding raise.
    """
    checkpoint = folder / "checkpoint"
    task = "encoder" if kind == "masked" else "auto"
    recipe = Recipe("tiny", checkpoint, tokenizer=False, task=task, **hints)
    with Store(folder / "data") as store:
        published = publish(recipe, store)
        paths = {file.name: store.path(file.name) for file in published.manifest.files}
    manifest = published.manifest
    everything = Span(0, len(manifest.blocks) - 1)
    held = HeldModel(published.model.v2, manifest, published.folder, paths, everything, "F32")
    sides = []
    for side in range(len(manifest.sides)):
        blocks = manifest.side_blocks(side)
        cuts = sorted({0, (len(blocks) + 1) // 3, 2 * len(blocks) // 3, len(blocks)})
        spans = (Span(blocks.first + first, blocks.first + stop - 1) for first, stop in pairwise(cuts))
        sides.append([held.runner(span) for span in spans])
    return sides


class Chain:
    """One session over all spans; every border goes through its wire form, as between holders."""

    def __init__(
        self, runners: list[SpanRunner], batch: int = 1, pads: tuple[int, ...] = (), encoded: Encoded | None = None
    ) -> None:
        self._runners = runners
        self._caches = [runner.open(batch, MAX_LENGTH, pads, encoded) for runner in runners]

    def step(self, ids: torch.Tensor, want: Want = Want.LOGITS_LAST) -> torch.Tensor:
        """Logits [batch, 1 or n, vocabulary] behind ``ids``, [batch, n]."""
        tensors: tuple[Tensor, ...] = (pack(ids),)
        for runner, cache in zip(self._runners, self._caches, strict=True):
            given = from_wire(tensors, ids=runner.has_stem)
            result = runner.forward(cache, given, ids.shape[1], want=want)
            tensors = to_wire(result)
        assert isinstance(result, Logits)
        return result.logits

    def decode(self, ids: torch.Tensor, tokens: int) -> Decoded:
        """What greedy decoding adds to ``ids``."""
        logits = [self.step(ids)]
        picked = [logits[-1][:, -1].argmax(-1, keepdim=True)]
        while len(picked) < tokens:
            logits.append(self.step(picked[-1]))
            picked.append(logits[-1][:, -1].argmax(-1, keepdim=True))
        return Decoded(torch.cat(picked, dim=1), torch.cat(logits, dim=1))
