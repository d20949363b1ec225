"""Small random models, and any model cut into block files, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from torrentlm.compute.border import pack
from torrentlm.compute.cache import SpanCache
from torrentlm.compute.chain import Chain as OneSession
from torrentlm.compute.span import SpanRunner
from torrentlm.compute.split import Hints, Split, named_weights
from torrentlm.compute.splitter import analyse_sides
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.publish.plan import Plan, PlannedBlock, plan
from torrentlm.wire.tensors import Tensor

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
CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM


def tiny_config(model_type: str = "llama", **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **TINY | settings)


def tiny(
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    auto: Any = CAUSAL,
    scale: float = 0.3,
    **settings: Any,
) -> PreTrainedModel:
    """A random model of a few layers whose greedy tokens vary from step to step; no weight is zero or one."""
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(model_type, **settings), dtype=dtype).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
            else:
                parameter.add_(torch.rand(parameter.shape).to(dtype), alpha=0.1)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What transformers' ``generate`` adds to ``ids``, [batch, tokens]."""
    mask = torch.ones_like(ids) if mask is None else mask
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return whole[:, -tokens:]


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The whole model's logits after ``ids``, [batch, 1, vocabulary], computed as ``generate`` does."""
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=1).logits


@dataclass
class Blocks:
    """A model's block files, a layer call in each, as publishing would plan them."""

    config: PretrainedConfig
    sides: tuple[Split, ...]
    planned: Plan
    paths: list[Path]

    @property
    def split(self) -> Split:
        return self.sides[0]

    def runner(
        self,
        first: int,
        last: int,
        dtype: torch.dtype = torch.float32,
        side: int = 0,
        device: str = "cpu",
        **ends: bool,
    ) -> SpanRunner:
        """Stem and head come with the first and the last layer unless ``has_stem`` or ``has_head`` says otherwise."""
        split = self.sides[side]
        stem = ends.get("has_stem", first == 0)
        head = ends.get("has_head", last == split.layers - 1)
        start = sum(before.layers + 2 for before in self.sides[:side])
        numbers = [start + 1 + layer for layer in range(first, last + 1) if layer < split.layers]
        numbers = [*([start] if stem else ()), *numbers, *([start + split.layers + 1] if head else ())]
        return SpanRunner(
            self.config,
            split,
            first,
            last,
            has_stem=stem,
            has_head=head,
            weights=self.files([self.planned.blocks[number] for number in numbers]),
            dtype=dtype,
            device=device,
        )

    def files(self, blocks: Sequence[PlannedBlock]) -> list[tuple[Path, tuple[tuple[str, str], ...]]]:
        return [(self.paths[file], self.planned.files[file].names) for block in blocks for file in block.files]

    def thirds(self, dtype: torch.dtype = torch.float32, side: int = 0) -> list[SpanRunner]:
        count = self.sides[side].layers
        cuts = sorted({0, count // 3, 2 * count // 3, count})
        return [self.runner(start, stop - 1, dtype, side) for start, stop in pairwise(cuts)]


def cut(model: PreTrainedModel, folder: Path, hints: Hints | None = None) -> Blocks:
    """Write a model's weights as canonical block files, planned as when a model is published."""
    sides = analyse_sides(model.config, hints or Hints())
    stored = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    planned = plan(stored, [name for name, _ in named_weights(model)], sides, 1)
    paths = []
    for number, file in enumerate(planned.files):
        packed = {name: pack(stored[source]) for name, source in file.tensors.items()}
        target = layout(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in packed.items())
        paths.append(folder / f"{number}.safetensors")
        with paths[-1].open("wb") as sink:
            write(target, partial(_chunks, packed), sink.write)
    return Blocks(model.config, sides, planned, paths)


def _chunks(packed: Mapping[str, Tensor], name: str) -> list[memoryview]:
    return [memoryview(packed[name].data)]


class Chain(OneSession):
    """One session over spans, as on several holders, that goes back and changes its rows as a client has them do."""

    @property
    def runners(self) -> list[SpanRunner]:
        return [runner for runner, _ in self.hops]

    @property
    def caches(self) -> list[SpanCache]:
        return [cache for _, cache in self.hops]

    def trim(self, length: int) -> None:
        for runner, cache in self.hops:
            runner.trim(cache, length)

    def reorder(self, rows: list[int]) -> None:
        for runner, cache in self.hops:
            runner.reorder(cache, rows)

    def greedy(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """[batch, tokens]: what greedy decoding adds to ``ids``."""
        return self.decode(ids, tokens)[0]
