"""Small random models, and any model cut into block files, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from torrentlm.compute.border import Logits, pack
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Split, analyse
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.wire.messages import Want

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(
    model_type: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A random model of a few layers, wide enough apart that greedy tokens do not hang on rounding."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **TINY | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    return model


@dataclass
class Blocks:
    """A model's block files in a folder: names and files for each, as a manifest would list them."""

    config: PretrainedConfig
    split: Split
    stem: list[tuple[Path, list[tuple[str, str]]]]
    layers: list[list[tuple[Path, list[tuple[str, str]]]]]
    head: list[tuple[Path, list[tuple[str, str]]]]

    def runner(self, first: int, last: int, dtype: torch.dtype = torch.float32, **ends: bool) -> SpanRunner:
        stem = ends.get("has_stem", first == 0)
        head = last == self.split.layers - 1 if "has_head" not in ends else ends["has_head"]
        files = [file for layer in self.layers[first : last + 1] for file in layer]
        files = (self.stem if stem else []) + files + (self.head if head else [])
        return SpanRunner(
            self.config, self.split, first, last, has_stem=stem, has_head=head, weights=files, dtype=dtype
        )

    def thirds(self, dtype: torch.dtype = torch.float32) -> list[SpanRunner]:
        n = self.split.layers
        cuts = [0, n // 3, 2 * n // 3, n]
        return [self.runner(a, b - 1, dtype) for a, b in pairwise(cuts)]


def cut(model: PreTrainedModel, folder: Path) -> Blocks:
    """Write a model's weights as canonical block files: one per layer, tied tensors in a file of their own."""
    split = analyse(model.config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in split.canonical}
    shared = [name for name in split.stem if name in split.head]

    def file(label: str, prefix: str, names: list[str]) -> tuple[Path, list[tuple[str, str]]]:
        tensors = {name.removeprefix(prefix): weights[name] for name in names}
        packed = {name: pack(tensor) for name, tensor in tensors.items()}
        target = layout(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in packed.items())
        path = folder / f"{label}.safetensors"
        with path.open("wb") as sink:
            write(target, lambda name: [packed[name].data], sink.write)
        return path, [("", prefix)]

    common = [file("shared", "", shared)] if shared else []
    layers = []
    for layer in range(split.layers):
        prefix = split.layer_prefix(layer)
        own = [file(f"layer{layer}", prefix, [name for name in weights if name.startswith(prefix)])]
        if split.extra[layer]:
            own.append(file(f"extra{layer}", "", list(split.extra[layer])))
        layers.append(own)
    stem = [*common, file("stem", "", only)] if (only := [n for n in split.stem if n not in shared]) else common
    head = [*common, file("head", "", only)] if (only := [n for n in split.head if n not in shared]) else common
    return Blocks(model.config, split, stem, layers, head)


class Chain:
    """Spans one after the other, as a session on several holders runs them."""

    def __init__(self, runners: list[SpanRunner], batch: int, max_length: int, pads: tuple[int, ...] = ()) -> None:
        self.runners = runners
        self.caches = [runner.open(batch, max_length, pads) for runner in runners]

    def step(self, ids: torch.Tensor, want: Want = Want.LOGITS_LAST) -> torch.Tensor:
        passed: Any = ids
        for runner, cache in zip(self.runners, self.caches, strict=True):
            passed = runner.forward(cache, passed, want=want)
        return passed.logits if isinstance(passed, Logits) else passed.tensors[0]

    def trim(self, length: int) -> None:
        for runner, cache in zip(self.runners, self.caches, strict=True):
            runner.trim(cache, length)

    def reorder(self, rows: list[int]) -> None:
        for runner, cache in zip(self.runners, self.caches, strict=True):
            runner.reorder(cache, rows)

    def greedy(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """[batch, tokens]: what greedy decoding adds to ``ids``."""
        picked = [self.step(ids)[:, -1].argmax(-1, keepdim=True)]
        while len(picked) < tokens:
            picked.append(self.step(picked[-1])[:, -1].argmax(-1, keepdim=True))
        return torch.cat(picked, dim=1)
