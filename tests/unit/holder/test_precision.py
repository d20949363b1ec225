"""Blocks held in several precisions: a model published as any other, then held and run so."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from torrentlm.compute.chain import Chain
from torrentlm.compute.quantization import packed
from torrentlm.compute.quantization.tensor import QuantizedTensor
from torrentlm.config import NodeConfig, Recipe
from torrentlm.errors import ConfigError
from torrentlm.holder.model import HeldModel
from torrentlm.node.memory import weights_bytes
from torrentlm.node.precisions import asked_for
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Want

LAYERS = 4
ALL = Span(0, LAYERS + 1)
IDS = torch.arange(12)[None] * 5 % 64
MIXED = {1: "INT8", 2: "INT4", 3: "INT4"}


@dataclass
class Held:
    published: Published
    paths: dict[str, Path]

    def __call__(self, compute: str = "BF16", stored: dict[int, str] | None = None, **given: Any) -> HeldModel:
        of = self.published
        span = given.pop("span", ALL)
        return HeldModel(of.model.v2, of.manifest, of.folder, self.paths, span, compute, stored=stored, **given)


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Held:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
    with Store(folder / "data") as store:
        published = publish(Recipe("tiny", folder / "checkpoint", tokenizer=False), store)
        return Held(published, {file.name: store.path(file.name) for file in published.manifest.files})


def logits(held: HeldModel) -> torch.Tensor:
    return Chain([held.runner(held.span)], 1, 32).decode(IDS, 4)[1].float()


def step(held: HeldModel) -> torch.Tensor:
    return Chain([held.runner(held.span)], 1, 32).step(IDS, Want.LOGITS_ALL).float()


def kinds(held: HeldModel) -> dict[str, str]:
    model = held.runner(held.span)._model
    return {
        name: weight.packed.kind for name, weight in model.named_parameters() if isinstance(weight, QuantizedTensor)
    }


def test_a_mixed_span_computes_what_its_weights_stand_for(hold: Held) -> None:
    due = step(hold("F32"))
    mixed = hold(stored=MIXED)
    error = float((step(mixed) - due).norm() / due.norm())
    assert 0.001 < error < 0.1
    assert mixed.precision == "BF16+INT8+INT4"
    found = kinds(mixed)
    assert len(found) == 3 * 7
    assert all(MIXED[int(name.split(".")[2]) + 1] == kind for name, kind in found.items())


def test_weights_take_what_is_said(hold: Held) -> None:
    manifest = hold.published.manifest
    said = weights_bytes(manifest, "BF16", MIXED)
    runner = hold(stored=MIXED).runner(ALL)
    found = [tensor.packed if isinstance(tensor, QuantizedTensor) else tensor for tensor in runner.weights]
    assert sum(said.values()) == sum(part.nbytes for part in found)
    assert sum(said.values()) < sum(weights_bytes(manifest, "BF16").values())


def test_runners_share_quantized_weights(hold: Held) -> None:
    held = hold(stored=MIXED)
    whole, part = held.runner(ALL), held.runner(Span(2, 3))
    name = "model.layers.1.mlp.up_proj.weight"
    weights = [dict(runner._model.named_parameters())[name].packed.codes.data_ptr() for runner in (whole, part)]
    assert weights[0] == weights[1]


def test_parts_compute_what_the_whole_does(hold: Held) -> None:
    held = hold(stored=MIXED)
    parts = [held.runner(span) for span in (Span(0, 1), Span(2, 2), Span(3, 5))]
    found = Chain(parts, 1, 32).decode(IDS, 4)[1].float()
    assert torch.equal(found, logits(held))


def test_memory_holds_what_runners_use(hold: Held) -> None:
    manifest = hold.published.manifest
    held = hold(stored=MIXED, sizes=weights_bytes(manifest, "BF16", MIXED))
    units = held.units(ALL)
    assert {unit.precision for unit in units} == {"BF16", "INT8", "INT4"}
    loaded = [part for unit in units for part in unit.load()]
    found = [tensor for part in loaded for tensor in part.tensors.values()]
    assert sum(unit.bytes for unit in units) == sum(getattr(part, "packed", part).nbytes for part in found)
    assert {id(tensor) for tensor in found if isinstance(tensor, QuantizedTensor)} == {
        id(tensor) for tensor in held.runner(ALL).weights if isinstance(tensor, QuantizedTensor)
    }
    keys = [unit.key for unit in units]
    assert held.blocks_of(keys) == list(ALL)
    assert held.blocks_of(keys[:2]) == [0, 1]


def test_a_sample_is_compared_with_the_published_weights(hold: Held) -> None:
    sidecar = hold.published.sidecar
    assert sidecar is not None
    checked = hold("F32", dict.fromkeys(range(1, LAYERS + 1), "INT4")).recheck([1, 2], sidecar)
    assert checked is not None
    assert checked.good


def test_the_second_start_maps_what_the_first_one_made(
    hold: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "quantized"
    gc.collect()  # what other tests loaded would be shared
    due = logits(hold(stored=MIXED, quantized=cache))
    gc.collect()
    assert len(list(cache.glob("*.safetensors"))) == len(MIXED)

    def never(*args: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr("torrentlm.compute.quantization.recipe.pack", never)
    assert torch.equal(logits(hold(stored=MIXED, quantized=cache)), due)
    gc.collect()
    for path in cache.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError, match="there already"):
        hold(stored=MIXED, quantized=cache).runner(ALL)


def test_without_a_kernel_it_computes_the_same(hold: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    due = step(hold(stored=MIXED))
    monkeypatch.setattr(packed, "kernel_works", lambda kind, device: False)
    found = step(hold(stored=MIXED))
    assert torch.allclose(found, due, atol=0.05)


def test_what_f16_cannot_hold_is_found(hold: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = hold.published.sidecar
    assert sidecar is not None
    held = hold("F32")
    assert held.overflowing(sidecar) == ()
    assert torch.isfinite(step(hold("F16"))).all()


def test_activations_beyond_f16_are_found(hold: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = hold.published.sidecar
    assert sidecar is not None
    monkeypatch.setattr("torrentlm.compute.overflow.F16_MAX", 2.0)
    for precision in ("F32", "F16"):
        assert hold(precision).overflowing(sidecar) == tuple(ALL), "whatever it is held in"


def asked(**given: Any) -> NodeConfig:
    return NodeConfig(**given)


def test_what_an_operator_asks_for(hold: Held) -> None:
    manifest = hold.published.manifest
    assert asked_for(manifest, asked()).compute == "F32"
    every = asked_for(manifest, asked(precision="INT4", precision_of=((Span(1, 2), "INT8"), (Span(4, 5), "BF16"))))
    assert every.compute == "BF16"
    assert every.stored == {1: "INT8", 2: "INT8", 3: "INT4"}


@pytest.mark.parametrize(
    ("floor", "given", "says"),
    [
        ("INT8", {"precision": "INT4"}, "no precision below INT8"),
        ("BF16", {"precision_of": ((Span(1, 1), "INT8"),)}, "no precision below BF16"),
        (None, {"precision": "BF16", "precision_of": ((Span(1, 1), "F32"),)}, "computes in one dtype"),
        (None, {"precision_of": ((Span(1, 9), "INT8"),)}, "it has blocks 0-5"),
    ],
)
def test_what_an_operator_cannot_have(hold: Held, floor: str | None, given: dict[str, Any], says: str) -> None:
    manifest = replace(hold.published.manifest, floor=floor)
    with pytest.raises(ConfigError, match=says):
        asked_for(manifest, asked(**given))


def test_lora_adds_to_quantized_layers(hold: Held, adapted: Callable[[HeldModel], torch.Tensor]) -> None:
    held = hold("F32", MIXED)
    difference = adapted(held) - logits(held)[:, :1]
    wanted = adapted(hold("F32")) - logits(hold("F32"))[:, :1]
    assert (difference - wanted).norm() < 0.3 * wanted.norm()


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[[HeldModel], torch.Tensor]:
    """Logits behind the prompt with a LoRA on a linear layer of the second block."""
    from tests.unit.compute.test_weights import write_file
    from torrentlm.compute.adapter import Adapter
    from torrentlm.manifest.adapter import DOWN, UP

    name = "model.layers.1.mlp.down_proj"
    made = torch.Generator().manual_seed(3)
    path = tmp_path / "adapter.safetensors"
    write_file(
        path,
        {name + DOWN: torch.randn(4, 128, generator=made), name + UP: torch.randn(64, 4, generator=made)},
    )

    def run(held: HeldModel) -> torch.Tensor:
        runner = held.runner(held.span)
        adapter = Adapter([(path, [("", "")])], {name: 1.0}, runner.dtype, runner.device)
        runner.check_adapter(adapter)
        made = runner.forward(runner.open(1, 32), IDS, IDS.shape[1], want=2, adapter=adapter)
        return made.logits.float()  # type: ignore[union-attr]

    return run
