"""The model that is measured, published and held as any other, and the same off the grid of four bits.

The demo's weights come from a file of 4-bit groups of 32: rounding to nearest finds that grid again and loses next to
nothing, which says nothing about other checkpoints. So there is a second model, whose layers' matrices are moved by a
random part of a step of the grid, as far as a checkpoint that was never in four bits may lie from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from torrentlm.cli.demo import find_recipe
from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe, load
from torrentlm.holder.model import HeldModel
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.publish.source import locate
from torrentlm.records import Span
from torrentlm.swarm.store import Store

GROUP = 32


@dataclass(frozen=True)
class Model:
    """A published model and where its blocks are."""

    published: Published
    paths: dict[str, Path]

    @property
    def span(self) -> Span:
        return Span(0, len(self.published.manifest.blocks) - 1)

    def held(self, compute: str, stored: dict[int, str], quantized: Path | None = None) -> HeldModel:
        """Run so; quantized blocks are kept in the folder ``quantized``."""
        of = self.published
        return HeldModel(
            of.model.v2, of.manifest, of.folder, self.paths, self.span, compute, stored=stored, quantized=quantized
        )


def weights_in_memory(runner: SpanRunner) -> int:
    """Bytes of a runner's weights, each tensor once."""
    tensors = {id(tensor): tensor for tensor in runner.weights}
    return sum(getattr(tensor, "packed", tensor).nbytes for tensor in tensors.values())


def demo(data: Path) -> Model:
    """The demo's model as its recipe says."""
    recipe = load(find_recipe()).recipe
    assert recipe is not None
    return _published(recipe, data)


def off_the_grid(data: Path) -> Model:
    """The same model with moved weights, in F32."""
    folder = data / "off-the-grid-checkpoint"
    if not folder.exists():
        _save_moved(folder)
    return _published(Recipe("off-the-grid", folder, tokenizer=False), data)


def _save_moved(folder: Path) -> None:
    recipe = load(find_recipe()).recipe
    assert recipe is not None
    path = locate(recipe).path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    made = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for name, weight in state.items():
        if weight.dim() == 2 and "layers" in name:
            groups = weight.view(-1, GROUP)
            low, high = groups.aminmax(dim=-1, keepdim=True)
            groups += (torch.rand(groups.shape, generator=made) - 0.5) * (high - low) / 15
    config = model.config
    if hasattr(config, "quantization_config"):  # how the file was stored; what is saved is plain
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(state)
    fresh.save_pretrained(folder)


def _published(recipe: Recipe, data: Path) -> Model:
    with Store(data / recipe.name) as store:
        published = publish(recipe, store)
        return Model(published, {file.name: store.path(file.name) for file in published.manifest.files})
