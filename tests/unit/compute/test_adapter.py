"""A split model with an adapter against the whole model with the adapter merged into it by peft."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.peft_adapters import make_adapter, merged
from tests.unit.compute.checkpoints import greedy, prefill, tiny
from torrentlm.compute.adapter import Adapter, applied
from torrentlm.compute.border import Logits
from torrentlm.compute.lean import make_lean
from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError
from torrentlm.holder.model import HeldModel
from torrentlm.publish.peft import PeftFolder
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.swarm.store import Store
from torrentlm.wire.messages import Want

IDS = torch.tensor([[5, 9, 33, 71, 20, 3, 64, 8, 90, 17, 41]])


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter that peft saved into ``folder``, as one file."""
    scalings = {name: change.scaling for name, change in PeftFolder(folder).changes.items()}
    path = folder / "adapter_model.safetensors"
    return Adapter([(path, [("base_model.model.", "")])], scalings, dtype, torch.device("cpu"))


@dataclass
class Chain:
    """A session on spans one after the other, with an adapter in every step."""

    runners: list[SpanRunner]
    adapter: Adapter | None

    def __post_init__(self) -> None:
        self.caches = [runner.open(1, 64) for runner in self.runners]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, [1, 1, vocabulary]."""
        given: Any = ids
        for runner, cache in zip(self.runners, self.caches, strict=True):
            given = runner.forward(cache, given, ids.shape[1], want=Want.LOGITS_LAST, adapter=self.adapter)
        assert isinstance(given, Logits)
        return given.logits

    def greedy(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        picked = [self.step(ids)[:, -1].argmax(-1, keepdim=True)]
        while len(picked) < tokens:
            picked.append(self.step(picked[-1])[:, -1].argmax(-1, keepdim=True))
        return torch.cat(picked, dim=1)


class Held:
    """The checkpoint in ``folder``, published and held, in as many spans as a test wants."""

    def __init__(self, folder: Path, data: Path, precision: str = "F32") -> None:
        with Store(data) as store:
            published = publish(Recipe("base", folder, tokenizer=False), store)
            paths = {file.name: store.path(file.name) for file in published.manifest.files}
        self.all = Span(0, len(published.manifest.blocks) - 1)
        self._model = HeldModel(published.model.v2, published.manifest, published.folder, paths, self.all, precision)

    def spans(self, *firsts: int) -> list[SpanRunner]:
        stops = [*firsts[1:], len(self.all)]
        return [self._model.runner(Span(first, stop - 1)) for first, stop in zip(firsts, stops, strict=True)]


FAMILIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {}, {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.2.mlp.down_proj": 1}}),
    (
        "llama",
        {"tie_word_embeddings": False},
        {"target_modules": ["o_proj", "lm_head"]},
    ),
    ("gpt2", {"n_inner": 48}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("opt", {"ffn_dim": 48}, {"target_modules": ["fc1", "out_proj"]}),
    ("bloom", {"n_head": 4}, {"target_modules": ["query_key_value", "dense"]}),
    ("mamba", {"intermediate_size": 64}, {"target_modules": ["in_proj", "x_proj", "dt_proj"]}),
]


@pytest.mark.parametrize(("family", "settings", "lora"), FAMILIES)
def test_it_computes_what_the_merged_model_does(
    family: str, settings: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    base = save(tiny(family, **settings), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", **lora)
    whole, plain = merged(base, folder), tiny(family, **settings)
    runners = Held(base, tmp_path / "data").spans(0, 3, 5)
    adapter = load(folder)
    for runner in runners:
        runner.check_adapter(adapter)
    expected = prefill(whole, IDS)
    assert not torch.allclose(expected, prefill(plain, IDS), atol=0.1), "the adapter changes nothing"
    torch.testing.assert_close(Chain(runners, adapter).step(IDS), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(Chain(runners, adapter).greedy(IDS, 20), greedy(whole, IDS, 20))
    assert torch.equal(Chain(runners, None).step(IDS), prefill(plain, IDS)), "the base is not what it was"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny(), tmp_path / "base")


def test_sessions_with_different_adapters_take_turns(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    [runner] = Held(base, tmp_path / "data").spans(0)
    weights = {name: weight.data_ptr() for name, weight in runner._model.named_parameters()}
    kinds = [type(module) for module in runner._model.modules()]
    chains = [Chain([runner], None), *(Chain([runner], load(folder)) for folder in folders)]
    wholes = [tiny(), *(merged(base, folder) for folder in folders)]
    expected = [greedy(whole, IDS, 8)[0].tolist() for whole in wholes]
    assert len({tuple(tokens) for tokens in expected}) == 3
    given = [IDS] * 3
    said: list[list[int]] = [[], [], []]
    for _ in range(8):
        for number, session in enumerate(chains):
            given[number] = session.step(given[number])[:, -1].argmax(-1, keepdim=True)
            said[number].append(int(given[number]))
    assert said == expected
    assert {name: weight.data_ptr() for name, weight in runner._model.named_parameters()} == weights
    assert [type(module) for module in runner._model.modules()] == kinds


def test_a_step_that_fails_leaves_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    [runner] = Held(base, tmp_path / "data").spans(0)
    adapter = load(make_adapter(base, tmp_path / "adapter"))
    object.__setattr__(adapter.changes["model.layers.3.mlp.down_proj"], "down", torch.zeros(4, 7))
    with pytest.raises(Exception, match="could not be computed"):
        Chain([runner], adapter).step(IDS)
    assert torch.equal(Chain([runner], None).step(IDS), prefill(tiny(), IDS))


class Reader(nn.Module):
    """A model that calls one linear layer, and reads the weights of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(6, 5)
        self.read = nn.Linear(5, 4)
        self.turned = Conv1D(3, 4)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        called = self.called(input=value)
        return nn.functional.linear(called, self.read.weight) @ self.turned.weight


@pytest.mark.parametrize("lean", [False, True])
def test_weights_that_are_read_past_the_layer_are_changed_too(lean: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader()
    sizes = {"called": (6, 5), "read": (5, 4), "turned": (4, 3)}
    tensors = {}
    for name, (into, out) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2)
    save_file(tensors, tmp_path / "adapter.safetensors")
    files = [(tmp_path / "adapter.safetensors", [("", "")])]
    adapter = Adapter(files, dict.fromkeys(sizes, 0.5), torch.float32, torch.device("cpu"))
    adapter.check(model)
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for name in sizes:
            change = 0.5 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            whole.get_submodule(name).weight += change.T if name == "turned" else change
    if lean:
        make_lean(model)
    value = torch.randn(2, 6)
    with torch.inference_mode():
        plain = model(value)
        with applied(adapter, model):
            torch.testing.assert_close(model(value), whole(value))
        assert torch.equal(model(value), plain)


def test_bf16_rounds_a_little(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    runners = Held(base, tmp_path / "data", "BF16").spans(0, 3, 5)
    found = Chain(runners, load(folder, torch.bfloat16)).step(IDS).float()
    assert torch.cosine_similarity(found, prefill(merged(base, folder), IDS), dim=-1).min() > 0.99


def test_adapters_share_the_memory_of_equal_files(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    first, second = load(folder), load(folder)
    assert all(first.changes[name].down.data_ptr() == second.changes[name].down.data_ptr() for name in first.changes)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    for other, says in ((tiny(hidden_size=64), "made for another model"), (tiny("gpt2"), "no linear layer")):
        with pytest.raises(ArtifactError, match=says):
            load(folder).check(other)
    with pytest.raises(ArtifactError, match="disagree"):
        Adapter(
            [(folder / "adapter_model.safetensors", [("base_model.model.", "")])],
            {},
            torch.float32,
            torch.device("cpu"),
        )
