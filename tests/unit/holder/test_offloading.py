"""A held model with some of its blocks in the processor's memory: the same numbers, and never more than was said."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from tests.peft_adapters import make_adapter
from tests.unit.compute.kinds import KINDS, ids
from tests.unit.compute.test_adapter import Chain as AdapterChain
from tests.unit.compute.test_adapter import load
from tests.unit.holder.chain import publish_model
from torrentlm.compute.chain import Chain
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.offload import Stage
from torrentlm.compute.quantization.tensor import QuantizedTensor
from torrentlm.config import Recipe
from torrentlm.holder.memory import Memory, pin_all
from torrentlm.holder.model import HeldModel
from torrentlm.node.memory import offloadable, weights_bytes
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.route.assign import SLABS
from torrentlm.swarm.store import Store

LAYERS = 6
ALL = Span(0, LAYERS + 1)
IDS = torch.arange(2 * 9).view(2, 9) * 5 % 64
PLENTY = 1 << 40
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Held:
    published: Published
    paths: dict[str, Path]

    def __call__(self, compute: str, stored: dict[int, str], offloaded: Collection[int], span: Span = ALL) -> HeldModel:
        of = self.published
        may = offloadable(of.manifest, self.sizes(compute, stored), span)
        return HeldModel(
            of.model.v2, of.manifest, of.folder, self.paths, span, compute,
            sizes=self.sizes(compute, stored), stored=stored, offloaded={block: may[block] for block in offloaded},
        )  # fmt: skip

    def sizes(self, compute: str, stored: dict[int, str]) -> dict[str, int]:
        return weights_bytes(self.published.manifest, compute, stored)


def published(config: PretrainedConfig, folder: Path, **recipe: Any) -> Held:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "checkpoint")
    with Store(folder / "data") as store:
        made = publish(Recipe("tiny", folder / "checkpoint", tokenizer=False, **recipe), store)
        return Held(made, {file.name: store.path(file.name) for file in made.manifest.files})


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return published(LlamaConfig(**SIZES), tmp_path_factory.mktemp("llama"))


class Memories:
    """Those of a lane: what a model needs in each is loaded and pinned."""

    def __init__(self, held: HeldModel) -> None:
        self.device, self.aside = (Memory(PLENTY, free=lambda: PLENTY) for _ in range(2))
        self.device.evicted = self.aside.evicted = held.let_go
        self.held = held

    def load(self, span: Span | None = None) -> HeldModel:
        return trio.run(self._load, span or self.held.span)

    async def _load(self, span: Span) -> HeldModel:
        units = (self.device, self.held.units(span)), (self.aside, self.held.units_aside(span))
        (await pin_all(*units)).release()
        return self.held

    @property
    def stage(self) -> Stage:
        [stage] = [loaded for loaded in self.device._loaded.values() if isinstance(loaded, Stage)]
        return stage


FORMS = {
    "F32": ("F32", {}),
    "BF16": ("BF16", {}),
    "INT8": ("BF16", dict.fromkeys(range(1, LAYERS + 1), "INT8")),
    "INT4": ("BF16", dict.fromkeys(range(1, LAYERS + 1), "INT4")),
    "mixed": ("BF16", {2: "INT8", 3: "INT4", 5: "INT8"}),
}


def logits(*models: HeldModel) -> torch.Tensor:
    return Chain([model.runner(model.span) for model in models], 2, 32).decode(IDS, 8)[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offloaded", [(3,), (1, 2, 3), (3, 4, 5, 6), (1, 3, 4, 6), tuple(range(1, LAYERS + 1))])
def test_offloaded_blocks_compute_the_same_bits(hold: Held, form: str, offloaded: tuple[int, ...]) -> None:
    compute, stored = FORMS[form]
    due = logits(hold(compute, stored, ()))
    memories = Memories(hold(compute, stored, offloaded))
    assert torch.equal(logits(memories.load()), due)
    assert memories.stage._last != [None, None]


def test_sessions_that_take_turns_on_spans_of_one_stage(hold: Held) -> None:
    offloaded = (2, 3, 4, 5)
    whole = hold("F32", {}, ())
    model = Memories(hold("F32", {}, offloaded)).load()
    spans = (Span(0, 3), Span(4, 7)), (Span(0, 2), Span(3, 4), Span(5, 7)), (Span(0, 7),)
    chains = [Chain([model.runner(span) for span in parts], 1, 32) for parts in spans]
    due = [Chain([whole.runner(ALL)], 1, 32) for _ in spans]
    for step in range(6):
        for number, (chain, known) in enumerate(zip(chains, due, strict=True)):
            count = 5 if step == 0 else 1 + (step + number) % 3  # prompts, single tokens and a few at once
            given = (torch.arange(count)[None] * 7 + 11 * step + number) % 64
            assert torch.equal(chain.step(given), known.step(given))


def test_blocks_of_several_layers(tmp_path: Path) -> None:
    hold = published(LlamaConfig(**SIZES), tmp_path, layers_per_block=2)
    span = Span(0, LAYERS // 2 + 1)
    due = logits(hold("F32", {}, (), span))
    assert torch.equal(logits(Memories(hold("F32", {}, (1, 2, 3), span)).load()), due)


@pytest.mark.parametrize("form", ["BF16", "INT8"])
def test_a_mixture_of_experts(tmp_path: Path, form: str) -> None:
    hold = published(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), tmp_path)
    compute, stored = FORMS[form]
    due = logits(hold(compute, stored, ()))
    assert torch.equal(logits(Memories(hold(compute, stored, (2, 3, 4, 5))).load()), due)


@pytest.mark.parametrize("form", FORMS)
def test_the_device_has_two_slabs_and_what_is_resident_and_nothing_else(hold: Held, form: str) -> None:
    compute, stored = FORMS[form]
    offloaded = (2, 3, 4, 5)
    memories = Memories(hold(compute, stored, offloaded))
    model = memories.load()
    runner = model.runner(ALL)
    logits(model)
    sizes, may = hold.sizes(compute, stored), offloadable(model.manifest, hold.sizes(compute, stored), ALL)
    resident = {file.name for block in ALL if block not in offloaded for file in model.manifest.block_files(block)}
    slab = max(may[block] for block in offloaded)
    assert memories.device.used == SLABS * slab + sum(sizes[name] for name in resident)
    assert memories.aside.used == sum(may[block] for block in offloaded)

    parts = [part for weight in runner.weights for part in storages(weight)]
    apart = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    slabs = {pages.untyped_storage().data_ptr() for pages in memories.stage._slabs}
    assert slabs <= apart.keys() and sum(apart[pointer] for pointer in slabs) == SLABS * slab
    own = {name for layer in (1, 2, 3, 4) for name in runner._weights.tensors if f"layers.{layer}." in name}
    assert own and all(
        part.untyped_storage().data_ptr() in slabs for name in own for part in storages(runner._weights.tensors[name])
    )
    others = {
        part.untyped_storage().data_ptr()
        for name, weight in runner._weights.tensors.items()
        if name not in own
        for part in storages(weight)
    }
    assert not others & slabs


def storages(weight: torch.Tensor) -> list[torch.Tensor]:
    if isinstance(weight, QuantizedTensor):
        return list(weight.packed.parts.values())
    return [weight]


def test_a_block_that_was_let_go_of_computes_the_same_when_it_is_back(hold: Held) -> None:
    memories = Memories(hold("F32", {}, (2, 3, 4, 5)))
    due = logits(memories.load())
    for memory in (memories.aside, memories.device):
        assert memory.relieve()
        gc.collect()
        assert not memory.keys
        assert memories.held.blocks_of({*memories.device.keys, *memories.aside.keys}) == (
            [0, 1, 6, 7] if memory is memories.aside else []
        )
        assert torch.equal(logits(memories.load()), due)
        assert memories.held.blocks_of({*memories.device.keys, *memories.aside.keys}) == list(ALL)


def test_only_blocks_of_layers_with_a_file_of_their_own_may_be_offloaded(hold: Held, tmp_path: Path) -> None:
    sizes = hold.sizes("F32", {})
    assert set(offloadable(hold.published.manifest, sizes, ALL)) == set(range(1, LAYERS + 1))
    config = LlamaConfig(**SIZES)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[3].load_state_dict(model.model.layers[1].state_dict())  # equal layers are one file
    model.save_pretrained(tmp_path / "checkpoint")
    with Store(tmp_path / "data") as store:
        made = publish(Recipe("twice", tmp_path / "checkpoint", tokenizer=False), store)
    assert set(offloadable(made.manifest, weights_bytes(made.manifest, "F32"), ALL)) == {1, 3, 5, 6}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_kind_of_model_it_is(kind: str, tmp_path: Path) -> None:
    whole = KINDS[kind].build()
    whole.save_pretrained(tmp_path / "checkpoint")
    held = Held(*publish_model(tmp_path / "checkpoint", tmp_path / "data"))
    manifest = held.published.manifest
    span = Span(0, len(manifest.blocks) - 1)
    may = tuple(offloadable(manifest, held.sizes("F32", {}), span))
    memories = Memories(held("F32", {}, may, span))
    plain, offloaded = held("F32", {}, (), span), memories.load()
    for number in range(len(manifest.sides)):
        blocks = manifest.side_blocks(number)
        states = torch.randn(2, 7, plain.split_of(blocks.first).width or 1, generator=torch.Generator().manual_seed(1))
        encoded = Encoded(states, torch.ones(2, 7, dtype=torch.long)) if number else None
        runs = [Chain([model.runner(blocks)], 2, 32, (), encoded) for model in (plain, offloaded)]
        for count in (9,) if manifest.task == "encoder" or len(manifest.sides) > number + 1 else (9, 1, 1, 1):
            due, found = (chain.step(ids(2, count, 4)) for chain in runs)
            assert torch.equal(found, due)
    assert (memories.stage._last != [None, None]) if may else kind == "one module"


def test_an_adapter_changes_offloaded_layers_as_any_others(tmp_path: Path) -> None:
    held = published(LlamaConfig(**SIZES), tmp_path)
    adapter = load(make_adapter(tmp_path / "checkpoint", tmp_path / "adapter", 1))
    models = held("F32", {}, ()), Memories(held("F32", {}, (2, 3, 4, 5))).load()
    chains = [[AdapterChain([model.runner(ALL)], given) for given in (None, adapter)] for model in models]
    for _ in range(3):  # with it and without it in turns
        due, found = ([chain.step(IDS[:1]) for chain in pair] for pair in chains)
        assert torch.equal(found[0], due[0]) and torch.equal(found[1], due[1])
        assert not torch.equal(found[0], found[1])
