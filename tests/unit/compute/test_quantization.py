"""Weights in INT8 and INT4: what they stand for, how they lie in memory, and that a model's code can use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from torrentlm.compute.quantization import kept, packed, recipe
from torrentlm.compute.quantization.narrow import Narrow
from torrentlm.compute.quantization.packed import TILE, pack, pack_groups
from torrentlm.compute.quantization.recipe import matrices, quantized
from torrentlm.compute.quantization.rounding import GROUP, NORM, Grouped, by_groups, by_rows, nearest
from torrentlm.compute.quantization.tensor import QuantizedTensor
from torrentlm.compute.weights import map_file

CPU = torch.device("cpu")
KINDS = ("INT8", "INT4")


def heavy(seed: int, *shape: int) -> torch.Tensor:
    """Weights with outliers, as a model's are."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made) * (1 + torch.rand(shape, generator=made).pow(16) * 4) * 0.02


@given(st.sampled_from([(1,), (3,), (TILE,), (2 * TILE,), (2, TILE), (3, 5)]), st.integers(1, 3), st.integers(0, 99))
def test_codes_come_back_from_how_they_lie(lead: tuple[int, ...], groups: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    shape = (*lead, groups * GROUP) if len(lead) > 1 else (lead[0], groups * GROUP)
    codes = torch.randint(0, 16, shape, generator=made, dtype=torch.uint8)
    scale, offset = (torch.randn((*shape[:-1], groups), generator=made).bfloat16() for _ in range(2))
    grouped = Grouped(codes, scale, offset)
    made_of = pack_groups(grouped)
    assert made_of.shape == shape
    assert torch.equal(packed._unpacked(made_of.codes, made_of.tile), codes)
    assert torch.allclose(made_of.dense(torch.float32), grouped.weights(), atol=1e-6)


@given(st.integers(0, 999), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_no_weight_is_further_off_than_half_a_step(seed: int, size: float) -> None:
    weight = heavy(seed, 5, 3 * GROUP) * size
    codes, scale = by_rows(weight)
    step = scale.float()[:, None]
    # Scales are BF16: the greatest code may be cut by a part of 2^-8 of 127 steps.
    assert ((codes * step - weight).abs() <= step * (0.5 + 127 * 2**-8) + 1e-37).all()
    grouped = weight.view(5, 3, GROUP)
    width = (grouped.amax(-1) - grouped.amin(-1)).repeat_interleave(GROUP, -1) / 15
    assert (
        (nearest(weight).weights() - weight).abs() <= width * (0.5 + 15 * 2**-8) + weight.abs() * 2**-7 + 1e-37
    ).all()


@given(st.integers(0, 999))
def test_no_group_is_worse_than_rounded_to_nearest(seed: int) -> None:
    weight = heavy(seed, 8, 4 * GROUP)

    def badness(made: Grouped) -> torch.Tensor:
        return (made.weights() - weight).abs().pow(NORM).view(8, 4, GROUP).sum(-1)

    assert (badness(by_groups(weight)) <= badness(nearest(weight)) * (1 + 1e-4)).all()


def test_fitted_weights_and_products_are_nearer() -> None:
    weight = heavy(0, 128, 512)
    rows = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))

    def error(made: Grouped) -> float:
        return float((rows @ (made.weights() - weight).T).norm() / (rows @ weight.T).norm())

    assert error(by_groups(weight)) < 0.95 * error(nearest(weight))


@pytest.mark.parametrize("weight", [torch.zeros(4, GROUP), torch.full((4, GROUP), 3.0), torch.full((4, GROUP), -1e-20)])
def test_groups_of_equal_weights(weight: torch.Tensor) -> None:
    for made in (by_groups(weight).weights(), pack(weight, "INT8").dense(torch.float32)):
        assert torch.allclose(made, weight, rtol=2**-7)


def test_many_rows_are_fitted_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy(0, 3, 7, 2 * GROUP)
    whole = by_groups(weight)
    monkeypatch.setattr("torrentlm.compute.quantization.rounding.WEIGHTS_AT_ONCE", 4 * GROUP)
    parts = by_groups(weight)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.offset, parts.offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2 * TILE, 96), (40, 64)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_a_linear_layer_computes_with_what_the_weights_stand_for(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    weight = quantized(heavy(0, *shape), kind, dtype, False)
    assert isinstance(weight, QuantizedTensor)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert isinstance(layer.weight, QuantizedTensor)
    value = torch.randn(2, tokens, shape[1]).to(dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            due = functional.linear(value.float(), weight.dense().float(), layer.bias.float())
            assert torch.allclose(layer(value).float(), due, rtol=0.02, atol=0.02 * 0.02 * 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_that_keeps_its_weight_turned(kind: str) -> None:
    layer = Conv1D(2 * TILE, 64)
    weight = quantized(heavy(0, 64, 2 * TILE), kind, torch.float32, True)
    assert weight.shape == (64, 2 * TILE)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    value = torch.randn(2, 64)
    with torch.inference_mode():
        due = value @ weight.dense() + layer.bias  # type: ignore[attr-defined]
        assert torch.allclose(layer(value), due, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_one_parameter(kind: str) -> None:
    weight = nn.Parameter(quantized(heavy(0, 4, TILE, 64), kind, torch.float32, False), requires_grad=False)
    dense = weight.dense()  # type: ignore[attr-defined]
    value = torch.randn(3, 64)
    with torch.inference_mode():
        assert isinstance(weight[2], QuantizedTensor)
        assert torch.allclose(functional.linear(value, weight[2]), value @ dense[2].T, rtol=0.02, atol=0.005)
        assert torch.equal(weight[torch.tensor([3, 1])], dense[[3, 1]])
        batched = torch.bmm(value.expand(4, 3, 64), weight.transpose(1, 2))
        assert torch.allclose(batched, torch.bmm(value.expand(4, 3, 64), dense.transpose(1, 2)))
        assert torch.equal(weight + 1, dense + 1)


def test_whatever_else_is_done_with_it_is_done_with_its_weights() -> None:
    weight = quantized(heavy(0, 64, 64), "INT4", torch.float32, False)
    dense = weight.dense()  # type: ignore[attr-defined]
    assert torch.equal(weight[3:5], dense[3:5])
    assert torch.equal(weight.T, dense.T) or isinstance(weight.T, QuantizedTensor)
    assert torch.equal(weight.sum(0), dense.sum(0))
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    assert "INT4" in repr(weight)


def test_routers_norms_and_embeddings_stay() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    found = {name.removeprefix("model.layers.0.") for name in matrices(model) if "layers" in name}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert found == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_a_router_beside_a_list_of_experts_stays() -> None:
    layer = nn.Module()
    layer.gate = nn.Linear(64, 4)
    layer.up = nn.Linear(64, 128)
    layer.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    assert set(matrices(layer)) == {"up.weight", *(f"experts.{number}.weight" for number in range(4))}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": quantized(heavy(0, TILE, 64), "INT4", torch.bfloat16, False),
        "b.weight": quantized(heavy(1, 64, TILE), "INT8", torch.bfloat16, True),
        "norm": torch.randn(5).bfloat16(),
    }


def same(found: dict[str, torch.Tensor] | None, due: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == due.keys() and all(torch.equal(+found[key], +due[key]) for key in due)


def test_what_is_kept_on_disk_comes_back(tmp_path: Path) -> None:
    due = tensors()
    kept.keep(tmp_path / "quantized", "name.1", due)
    found = kept.find(tmp_path / "quantized", "name.1", torch.bfloat16, map_file)
    assert same(found, due)
    assert isinstance(found["b.weight"], QuantizedTensor)  # type: ignore[index]
    assert found["b.weight"].turned  # type: ignore[index]
    assert kept.find(tmp_path / "quantized", "other", torch.bfloat16, map_file) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum", "nonsense"])
def test_a_damaged_file_is_not_used(tmp_path: Path, damage: str) -> None:
    kept.keep(tmp_path, "name", tensors())
    path, about = tmp_path / "name.safetensors", tmp_path / "name.json"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "nonsense":
        about.write_text("[1")
    else:
        about.unlink()
    assert kept.find(tmp_path, "name", torch.bfloat16, map_file) is None


def test_files_of_another_recipe_and_left_parts_go(tmp_path: Path) -> None:
    for name in ("old.0-32-64.safetensors", "old.0-32-64.json", "half.1.part"):
        (tmp_path / name).write_text("x")
    name = kept.key_of("block", {"a": False}, "INT4", torch.bfloat16)
    kept.keep(tmp_path, name, tensors())
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors", f"{name}.json"}
    kept.keep(tmp_path, kept.key_of("other", {"a": False}, "INT4", torch.bfloat16), tensors())
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept.keep(tmp_path / "file", "name", tensors())
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_new_recipe_has_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept.key_of("block", {"a": False}, "INT4", torch.bfloat16)
    monkeypatch.setattr(recipe, "VERSION", recipe.VERSION + 1)
    assert kept.key_of("block", {"a": True}, "INT4", torch.bfloat16) != before
    assert kept.key_of("block", {"a": False}, "INT8", torch.bfloat16) != before


@pytest.mark.parametrize("turned", [False, True])
def test_what_stays_narrow_computes_as_if_it_were_wide(turned: bool) -> None:
    """Equal to the bit: a matrix is made wide for its product, an embedding's rows when they are asked for."""
    wide = heavy(3, 96, 64).bfloat16().float()
    weight = QuantizedTensor(Narrow(wide.bfloat16()), torch.float32, turned)
    due = wide.T if turned else wide
    value = heavy(4, 5, due.shape[1])
    assert (weight.dtype, weight.shape, weight.to(torch.float32) is weight) == (torch.float32, due.shape, True)
    assert torch.equal(functional.linear(value, weight), functional.linear(value, due))
    assert torch.equal(value @ weight.T, value @ due.T)
    assert torch.equal(weight * 2, due * 2)
    indices = torch.tensor([[3, 0, 3], [1, 2, 7]])
    assert torch.equal(functional.embedding(indices, weight), functional.embedding(indices, due))


def test_only_what_is_asked_for_becomes_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    dense = Narrow.dense

    def counting(self: Narrow, dtype: torch.dtype) -> torch.Tensor:
        counts.append(self.values.numel())
        return dense(self, dtype)

    monkeypatch.setattr(Narrow, "dense", counting)
    table = QuantizedTensor(Narrow(heavy(3, 96, 64).bfloat16()), torch.float32)
    functional.embedding(torch.tensor([[3, 0], [1, 2]]), table)
    experts = QuantizedTensor(Narrow(heavy(3, 8, 16, 64).bfloat16()), torch.float32)
    functional.linear(heavy(1, 2, 64), experts[5])
    assert torch.equal(experts[torch.tensor([1, 6])], experts.dense()[[1, 6]])
    assert counts == [4 * 64, 2 * 16 * 64, 8 * 16 * 64]
