"""The model under test, published and held as any other, and the spans that run it one after the other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe
from torrentlm.holder.model import HeldModel
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.swarm.store import Store

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
