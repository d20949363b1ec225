"""A split model with an adapter against the whole model with the adapter merged into it by peft."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.peft_adapters import make_adapter, merged
from tests.unit.compute.checkpoints import Chain, cut, greedy, prefill, tiny
from torrentlm.compute.adapter import Adapter, applied
from torrentlm.compute.lean import make_lean
from torrentlm.compute.span import SpanRunner
from torrentlm.errors import ArtifactError
from torrentlm.publish.peft import PeftFolder

IDS = torch.tensor([[5, 9, 33, 71, 20, 3, 64, 8, 90, 17, 41]])


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter that peft saved into ``folder``, as one file."""
    scalings = {name: change.scaling for name, change in PeftFolder(folder).changes.items()}
    path = folder / "adapter_model.safetensors"
    return Adapter([(path, [("base_model.model.", "")])], scalings, dtype, torch.device("cpu"))


def chain(runners: list[SpanRunner], adapter: Adapter | None) -> Chain:
    """Every step with the adapter."""
    chain = Chain(runners, 1, 64)
    chain.runners = [_With(runner, adapter) for runner in runners]  # type: ignore[misc]
    return chain


class _With:
    def __init__(self, runner: SpanRunner, adapter: Adapter | None) -> None:
        self.expects = runner.expects
        self.forward = partial(runner.forward, adapter=adapter)


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
    ("mixtral", {"num_local_experts": 4}, {"target_modules": ["q_proj", "o_proj"]}),
]


@pytest.mark.parametrize(("family", "settings", "lora"), FAMILIES)
def test_it_computes_what_the_merged_model_does(
    family: str, settings: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    base = save(tiny(family, **settings), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", **lora)
    whole, plain = merged(base, folder), tiny(family, **settings)
    runners = cut(plain, tmp_path).thirds()
    adapter = load(folder)
    for runner in runners:
        runner.check_adapter(adapter)
    expected = prefill(whole, IDS)
    assert not torch.allclose(expected, prefill(plain, IDS), atol=0.1), "the adapter changes nothing"
    torch.testing.assert_close(chain(runners, adapter).step(IDS), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(chain(runners, adapter).greedy(IDS, 20), greedy(whole, IDS, 20))
    assert torch.equal(chain(runners, None).step(IDS), prefill(plain, IDS)), "the base is not what it was"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny(), tmp_path / "base")


def test_sessions_with_different_adapters_take_turns(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    blocks = cut(tiny(), tmp_path)
    runner = blocks.runner(0, blocks.split.layers - 1)
    weights = {name: weight.data_ptr() for name, weight in runner._model.named_parameters()}
    kinds = [type(module) for module in runner._model.modules()]
    chains = [chain([runner], None), *(chain([runner], load(folder)) for folder in folders)]
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
    blocks = cut(tiny(), tmp_path)
    runner = blocks.runner(0, blocks.split.layers - 1)
    adapter = load(make_adapter(base, tmp_path / "adapter"))
    object.__setattr__(adapter.changes["model.layers.3.mlp.down_proj"], "down", torch.zeros(4, 7))
    with pytest.raises(Exception, match="could not be computed"):
        chain([runner], adapter).step(IDS)
    assert torch.equal(chain([runner], None).step(IDS), prefill(tiny(), IDS))


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
    runners = cut(tiny(), tmp_path).thirds(torch.bfloat16)
    found = chain(runners, load(folder, torch.bfloat16)).step(IDS).float()
    assert torch.cosine_similarity(found, prefill(merged(base, folder), IDS), dim=-1).min() > 0.99


def test_adapters_share_the_memory_of_equal_files(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    first, second = load(folder), load(folder)
    assert all(first.changes[name].down.data_ptr() == second.changes[name].down.data_ptr() for name in first.changes)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    blocks = cut(tiny(hidden_size=64), tmp_path)
    with pytest.raises(ArtifactError, match="made for another model"):
        blocks.runner(0, 1).check_adapter(load(folder))
    other = cut(tiny("gpt2"), tmp_path)
    with pytest.raises(ArtifactError, match="no linear layer"):
        other.runner(0, 1).check_adapter(load(folder))
    with pytest.raises(ArtifactError, match="disagree"):
        Adapter(
            [(folder / "adapter_model.safetensors", [("base_model.model.", "")])],
            {},
            torch.float32,
            torch.device("cpu"),
        )
