"""A block against its recorded sample: the same code agrees in every precision, other code does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from torrentlm.compute.samples import ROOM, choose
from torrentlm.compute.skeleton import read_config
from torrentlm.compute.splitter import analyse
from torrentlm.config import Recipe
from torrentlm.holder import model as holding
from torrentlm.holder.model import RECHECK_BLOCKS, HeldModel, Rechecked
from torrentlm.manifest.sidecar import Recorded, Samples, Sidecar
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store

from .chain import save_model

BLOCKS = 8


@dataclass(frozen=True)
class Tiny:
    published: Published
    paths: dict[str, Path]

    @property
    def sidecar(self) -> Sidecar:
        assert self.published.sidecar is not None
        return self.published.sidecar

    def held(self, span: Span, precision: str = "F32") -> HeldModel:
        published = self.published
        return HeldModel(published.model.v2, published.manifest, published.folder, self.paths, span, precision)


def made(recipe: Recipe, data: Path) -> Tiny:
    with Store(data) as store:
        published = publish(recipe, store)
        return Tiny(published, {file.name: store.path(file.name) for file in published.manifest.files})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("recheck")
    save_model(folder / "checkpoint")
    yield made(Recipe("tiny", folder / "checkpoint", tokenizer=False), folder / "data")


def checked(held: HeldModel, sidecar: Sidecar) -> Rechecked:
    found = held.recheck(held.worth_checking(held.arrived), sidecar)
    assert found is not None
    return found


@pytest.mark.parametrize("precision", ["F32", "BF16"])
@pytest.mark.parametrize("span", [Span(block, block) for block in range(BLOCKS)], ids=str)
def test_every_block_agrees_with_its_own_sample(span: Span, precision: str, tiny: Tiny) -> None:
    found = checked(tiny.held(span, precision), tiny.sidecar)
    assert found.good and found.block == span.first
    assert found.share < (0.001 if precision == "F32" else 0.05)


def test_one_layers_block_of_a_span_is_checked(tiny: Tiny) -> None:
    assert checked(tiny.held(Span(0, BLOCKS - 1)), tiny.sidecar).block == 1
    assert checked(tiny.held(Span(3, BLOCKS - 1)), tiny.sidecar).block == 3
    assert checked(tiny.held(Span(BLOCKS - 1, BLOCKS - 1)), tiny.sidecar).block == BLOCKS - 1


def wrong_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., None] = LlamaMLP.__init__

    def init(self: LlamaMLP, config: Any) -> None:
        original(self, config)
        self.act_fn = nn.GELU()

    monkeypatch.setattr(LlamaMLP, "__init__", init)


def wrong_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = modeling_llama.apply_rotary_pos_emb

    def turned_back(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any) -> Any:
        return original(q, k, cos, -sin, *more)[0], original(q, k, cos, sin, *more)[1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned_back)


@pytest.mark.parametrize("precision", ["F32", "BF16"])
@pytest.mark.parametrize("wrong", [wrong_activation, wrong_rotation])
def test_other_code_is_found_out(
    wrong: Callable[[pytest.MonkeyPatch], None], precision: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    found = checked(tiny.held(Span(0, BLOCKS - 1), precision), tiny.sidecar)
    assert not found.good and found.share > 0.1


def test_another_eps_is_found_out(tiny: Tiny) -> None:
    held = tiny.held(Span(1, 3))
    held._config.rms_norm_eps = 1e-2
    assert not checked(held, tiny.sidecar).good


def test_a_block_that_rounds_to_another_side_is_no_wrong_code(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block that differs is not enough: others are tried, but not all."""
    tried = []
    original = holding.check

    def check(runner: Any, samples: Samples) -> Any:
        tried.append(runner.layers.start)
        found = original(runner, samples)
        assert found is not None
        return replace(found, share=1.0) if runner.layers.start in wrong else found

    monkeypatch.setattr(holding, "check", check)
    held = tiny.held(Span(0, BLOCKS - 1))
    wrong = {0}
    assert checked(held, tiny.sidecar) == Rechecked(2, 0.0, good=True)
    assert tried == [0, 1]
    tried.clear()
    wrong = set(range(BLOCKS))
    assert not checked(held, tiny.sidecar).good
    assert len(tried) == RECHECK_BLOCKS


# -- Sidecars of peers, which may hold anything.


def with_samples(sidecar: Sidecar, **changes: Any) -> Sidecar:
    return replace(sidecar, samples=tuple(replace(samples, **changes) for samples in sidecar.samples))


def nothing_fits(recorded: Recorded) -> list[Samples | dict[str, Any]]:
    short = Recorded(recorded.dtype, (1, 1, 1), bytes(4))
    odd = Recorded("F8_E4M3", (1,), b"\0")
    return [
        {"borders": {}},
        {"borders": {1: (), 2: ()}},
        {"borders": {1: (short,), 2: (short,)}},
        {"borders": {1: (odd,), 2: (odd,)}},
        {"borders": {1: (recorded,), 2: (short,)}},
        {"borders": {1: (recorded,), 2: (recorded, recorded)}},
        {"tokens": (1,)},
        {"encoded": (short,)},
        {"encoded": (odd,)},
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_sample_that_does_not_fit_says_nothing(number: int, tiny: Tiny) -> None:
    held = tiny.held(Span(2, 2))
    [recorded] = tiny.sidecar.samples[0].borders[1]
    changes: Any = nothing_fits(recorded)[number]
    assert held.recheck([2], with_samples(tiny.sidecar, **changes)) is None
    assert held.recheck([2], replace(tiny.sidecar, samples=())) is None


def test_token_ids_that_the_model_has_not(tiny: Tiny) -> None:
    assert tiny.held(Span(0, 0)).recheck([0], with_samples(tiny.sidecar, tokens=(2**31 - 1,) * 8)) is None


def test_values_that_are_none(tiny: Tiny) -> None:
    held = tiny.held(Span(2, 2))
    samples = tiny.sidecar.samples[0]
    nan = torch.full((8 * 32,), torch.nan).numpy().tobytes()
    border = (replace(samples.borders[1][0], data=nan),)
    found = held.recheck([2], with_samples(tiny.sidecar, borders={**samples.borders, 1: border}))
    assert found is not None and not found.good


# -- Encoder-decoders; and what is recorded of models large and small.


def test_both_sides_of_an_encoder_decoder(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4}
    AutoConfig.for_model("t5", **sizes).save_pretrained(tmp_path)
    tiny = made(Recipe("t5", config=tmp_path / "config.json", tokenizer=False), tmp_path / "data")
    for block in range(len(tiny.published.manifest.blocks)):
        assert checked(tiny.held(Span(block, block)), tiny.sidecar) == Rechecked(block, 0.0, good=True)


@pytest.mark.parametrize(
    ("width", "layers", "expected"),
    [(64, 4, (8, "F32", 5)), (4096, 32, (8, "BF16", 33)), (16384, 126, (4, "BF16", 24))],
)
def test_what_is_recorded_fits(width: int, layers: int, expected: tuple[int, str, int], tmp_path: Path) -> None:
    """A model of 405 billion parameters has pairs of neighbours left out, and every one that is kept is whole."""
    AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
    ).save_pretrained(tmp_path)
    split = analyse(read_config(tmp_path))
    split = replace(split, borders=(split.borders[1],) * (layers + 1))
    chosen = choose(split, range(layers + 1), "F32")
    assert (chosen.tokens, chosen.dtype, len(chosen.positions)) == expected
    assert len(chosen.positions) * chosen.tokens * width * (4 if chosen.dtype == "F32" else 2) <= ROOM
    pairs = [at for at in chosen.positions if at + 1 in chosen.positions]
    assert len(pairs) >= len(chosen.positions) // 2
    assert choose(split, range(layers + 1), "BF16").dtype == "BF16"
    assert choose(split, range(layers + 1), "F32", room=100).positions == ()
