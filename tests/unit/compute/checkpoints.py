"""Small random models, and any model cut into block files, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from torrentlm.compute.border import Logits, from_wire, pack, to_wire
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

Files = list[tuple[Path, list[tuple[str, str]]]]


def tiny(model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A random model of a few layers whose greedy tokens vary from step to step."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What transformers' ``generate`` adds to ``ids``, [batch, tokens]."""
    mask = torch.ones_like(ids) if mask is None else mask
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return whole[:, ids.shape[1] :]


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The whole model's logits after ``ids``, [batch, 1, vocabulary], computed as ``generate`` does."""
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=1).logits


@dataclass
class Blocks:
    """A model's block files, with the names that a manifest would list for each."""

    config: PretrainedConfig
    split: Split
    stem: Files
    layers: list[Files]
    head: Files

    def runner(self, first: int, last: int, dtype: torch.dtype = torch.float32, **ends: bool) -> SpanRunner:
        """Stem and head come with the first and the last layer unless ``has_stem`` or ``has_head`` says otherwise."""
        stem = ends.get("has_stem", first == 0)
        head = ends.get("has_head", last == self.split.layers - 1)
        files = [file for layer in self.layers[first : last + 1] for file in layer]
        files = [*(self.stem if stem else ()), *files, *(self.head if head else ())]
        return SpanRunner(
            self.config, self.split, first, last, has_stem=stem, has_head=head, weights=files, dtype=dtype
        )

    def thirds(self, dtype: torch.dtype = torch.float32) -> list[SpanRunner]:
        count = self.split.layers
        cuts = [0, count // 3, 2 * count // 3, count]
        return [self.runner(start, stop - 1, dtype) for start, stop in pairwise(cuts)]


def cut(model: PreTrainedModel, folder: Path) -> Blocks:
    """Write a model's weights as canonical block files: one per layer, tied tensors in a file of their own."""
    split = analyse(model.config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in split.canonical}

    def files(label: str, names: list[str], prefix: str = "") -> Files:
        if not names:
            return []
        packed = {name.removeprefix(prefix): pack(weights[name]) for name in names}
        target = layout(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in packed.items())
        path = folder / f"{label}.safetensors"
        with path.open("wb") as sink:
            write(target, lambda name: [packed[name].data], sink.write)
        return [(path, [("", prefix)])]

    shared = [name for name in split.stem if name in split.head]
    common = files("shared", shared)
    prefixes = [split.layer_prefix(layer) for layer in range(split.layers)]
    own = [[name for name in weights if name.startswith(prefix)] for prefix in prefixes]
    return Blocks(
        model.config,
        split,
        stem=common + files("stem", [name for name in split.stem if name not in shared]),
        layers=[files(f"layer-{i}", names, prefixes[i]) for i, names in enumerate(own)],
        head=common + files("head", [name for name in split.head if name not in shared]),
    )


class Chain:
    """Spans one after the other, as a session on several holders runs them; every border goes through its wire form."""

    def __init__(self, runners: list[SpanRunner], batch: int, max_length: int, pads: tuple[int, ...] = ()) -> None:
        self.runners = runners
        self.batch = batch
        self.caches = [runner.open(batch, max_length, pads) for runner in runners]

    def step(self, ids: torch.Tensor, want: Want = Want.LOGITS_LAST) -> torch.Tensor:
        """Logits, or the last hidden state where none are wanted."""
        tensors = (pack(ids),)
        for runner, cache in zip(self.runners, self.caches, strict=True):
            result = runner.forward(cache, from_wire(tensors, ids=runner.has_stem), ids.shape[1], want=want)
            tensors = to_wire(result)
        return result.logits if isinstance(result, Logits) else result.tensors[0]

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
