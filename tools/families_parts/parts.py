"""The model under test: its weights as block files on disk, and the spans that run them one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from whole import Decoded

from torrentlm.compute.border import Logits, from_wire, pack, to_wire
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.skeleton import read_config
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Hints, Split, analyse_sides, named_weights
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.publish.plan import Plan, plan
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

MAX_LENGTH = 64


def thirds(model: PreTrainedModel, folder: Path, hints: Hints) -> list[list[SpanRunner]]:
    """Three spans for each side of the model whose config.json is in ``folder``, from the block files that are written
    there.

    Raises what the splitter, the plan of the files and the spans raise.
    """
    config = read_config(folder)
    sides = analyse_sides(config, hints)
    stored = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = [name for name, _ in named_weights(model)]
    planned = plan(stored.keys(), weights, sides, layers_per_block=1)
    paths = _write(planned, stored, folder)
    found, stem = [], 0
    for split in sides:
        count = split.layers
        cuts = sorted({0, count // 3, 2 * count // 3, count})
        found.append([_span(config, split, planned, paths, stem, first, stop) for first, stop in pairwise(cuts)])
        stem += count + 2
    return found


def _write(planned: Plan, stored: dict[str, torch.Tensor], folder: Path) -> list[Path]:
    paths = []
    for number, file in enumerate(planned.files):
        packed = {name: pack(stored[source]) for name, source in file.tensors.items()}
        target = layout(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in packed.items())
        paths.append(folder / f"{number}.safetensors")
        with paths[-1].open("wb") as sink:
            write(target, partial(_chunks, packed), sink.write)
    return paths


def _chunks(packed: Mapping[str, Tensor], name: str) -> list[memoryview]:
    return [memoryview(packed[name].data)]


def _span(
    config: PretrainedConfig, split: Split, planned: Plan, paths: list[Path], stem: int, first: int, stop: int
) -> SpanRunner:
    """Layers ``first`` to ``stop - 1`` of the side whose stem is block ``stem``; its head is ``layers + 1`` blocks on."""
    has_stem, has_head = first == 0, stop == split.layers
    blocks = planned.blocks[stem + (0 if has_stem else first + 1) : stem + (stop + 2 if has_head else stop + 1)]
    files = [(paths[file], planned.files[file].names) for block in blocks for file in block.files]
    return SpanRunner(config, split, first, stop - 1, has_stem=has_stem, has_head=has_head, weights=files)


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
