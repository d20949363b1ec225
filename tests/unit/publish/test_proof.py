"""The proof at publishing: what it finds exact, what it refuses, and that it changes no magnet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DogeConfig, MistralConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.e2e import checkpoint
from tests.unit.publish.models import listing, save_llama
from torrentlm.compute import chain, weights
from torrentlm.compute.samples import TOKENS
from torrentlm.compute.skeleton import read_config
from torrentlm.compute.span import SpanRunner
from torrentlm.config import Recipe
from torrentlm.errors import RefusedError, UnsupportedModelError
from torrentlm.manifest.sidecar import Libraries, Sidecar
from torrentlm.publish import in_parts, proof
from torrentlm.publish import publish as publishing
from torrentlm.publish.proof import Proof, prove
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published, recognise
from torrentlm.swarm.store import Store

Forward = Callable[..., Any]
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "bert": {**SMALL, "architectures": ["BertModel"]},
    "t5": {"vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as store:
        yield store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.make(tmp_path / "checkpoint")


def paths(published: Published, store: Store) -> dict[str, Path]:
    return {file.name: store.path(file.name) for file in published.manifest.files}


def again(published: Published, store: Store, **how: Any) -> Proof:
    config = read_config(published.folder)
    return prove(published.manifest, config, published.folder, paths(published, store), **how)


def sidecar_of(published: Published, store: Store) -> Sidecar:
    data = store.load_sidecar(published.model.v2)
    assert data is not None
    return Sidecar.from_bytes(data, published.model.v2)


def test_publishing_leaves_a_sidecar(folder: Path, store: Store) -> None:
    published = publish(Recipe("Tiny", folder), store)
    sidecar = sidecar_of(published, store)
    assert published.sidecar == sidecar
    [outcome] = sidecar.outcomes
    assert outcome.dtype == "F32" and outcome.exact and outcome.max_abs == 0.0
    assert outcome.tokens == outcome.agreeing == TOKENS[0] + proof.SINGLE
    assert (sidecar.parts, sidecar.text, sidecar.streamed) == (3, True, False)
    [samples] = sidecar.samples
    assert sorted(samples.borders) == list(range(checkpoint.LAYERS + 1))
    assert not any("sidecar" in "/".join(file.path) for file in published.model.files)


def test_other_libraries_give_the_same_magnet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    magnets, versions = [], []
    for number in (1, 2):
        made_with = Libraries("9.9", f"8.{number}", "7", "some processor")
        monkeypatch.setattr(proof, "libraries", lambda made_with=made_with: made_with)
        with Store(tmp_path / f"data-{number}") as store:
            published = publish(Recipe("Tiny", folder), store)
            magnets.append(str(published.magnet))
            versions.append(sidecar_of(published, store).made_with.transformers)
    assert versions == ["8.1", "8.2"]
    assert magnets[0] == magnets[1]


def test_a_second_run_proves_only_what_has_no_proof(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish(Recipe("Tiny", folder), store)
    monkeypatch.setattr("torrentlm.publish.publish.prove", None)
    assert publish(Recipe("Tiny", folder), store).sidecar == published.sidecar
    monkeypatch.undo()
    [path] = (store.data / "sidecars").iterdir()
    path.write_bytes(b"nonsense")
    assert recognise(Recipe("Tiny", folder), store) is None
    assert publish(Recipe("Tiny", folder), store).magnet == published.magnet
    assert sidecar_of(published, store).outcomes[0].exact
    assert recognise(Recipe("Tiny", folder), store) is not None


def test_the_published_precision_is_compared_too(tmp_path: Path, store: Store) -> None:
    save_llama(tmp_path / "checkpoint", dtype=torch.bfloat16)
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    published = publish(Recipe("Tiny", tmp_path / "checkpoint", tokenizer=False), store)
    sidecar = sidecar_of(published, store)
    exact, rounded = sidecar.outcomes
    assert (exact.dtype, exact.exact, exact.from_f32) == ("F32", True, 0.0)
    assert rounded.dtype == "BF16" and rounded.good and 0 < rounded.from_f32 < 0.1
    assert not sidecar.text and exact.tokens == TOKENS[0] + proof.SINGLE


def test_a_large_model_needs_no_f32_where_its_own_precision_is_exact(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "checkpoint", dtype=torch.bfloat16)
    published = publish(Recipe("Tiny", tmp_path / "checkpoint", tokenizer=False), store)
    found = again(published, store, large=0)
    [outcome] = found.outcomes
    assert (outcome.dtype, outcome.exact, outcome.from_f32) == ("BF16", True, None)
    [samples] = found.samples
    assert {tensor.dtype for border in samples.borders.values() for tensor in border} == {"BF16"}
    assert Sidecar.from_bytes(found.sidecar(bytes(32)).to_bytes(), bytes(32)).outcomes == found.outcomes
    # What is not exact there is settled in F32: here it is the rounding that differs.
    original: Forward = chain.to_wire

    def to_wire(result: Any) -> Any:
        packed = original(result)
        if packed[0].dtype == "BF16":
            data = bytearray(packed[0].data)
            data[0] ^= 1
            packed = (replace(packed[0], data=bytes(data)), *packed[1:])
        return packed

    monkeypatch.setattr(chain, "to_wire", to_wire)
    found = again(published, store, large=0)
    assert [(outcome.dtype, outcome.exact, outcome.good) for outcome in found.outcomes] == [
        ("BF16", False, True),
        ("F32", True, True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [0, proof.LARGE])
@pytest.mark.parametrize("kept", [4, 2048])
def test_a_model_that_sees_something_else_in_parts_is_refused(
    kept: int, large: int, dtype: torch.dtype, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token looks at the earlier ones that score best, among those of its part: a few, or more than there are in
    any text that is looked at.
    """
    monkeypatch.setattr(publishing, "prove", partial(prove, large=large))
    monkeypatch.setattr(weights, "LEAST", 1)
    torch.manual_seed(0)
    config = DogeConfig(**SMALL, num_key_value_heads=2, keep_window_size=kept, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match=r"a prompt in parts gives something else.*chunks = false"):
        publish(Recipe("Picks", tmp_path / "checkpoint", tokenizer=False), store)
    found = publish(Recipe("Picks", tmp_path / "checkpoint", tokenizer=False, chunks=False), store)
    assert not found.manifest.sides[-1].chunks
    others = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=kept)  # sees the same in parts
    AutoModelForCausalLM.from_config(others, dtype=dtype).save_pretrained(tmp_path / "other")
    assert publish(Recipe("Other", tmp_path / "other", tokenizer=False), store).manifest.sides[-1].chunks


def test_what_is_too_large_in_f32_is_not_looked_at(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(proof, "require_same_in_parts", lambda *given: looked.append(len(given[-2])))
    save_llama(tmp_path / "checkpoint", dtype=torch.bfloat16)
    published = publish(Recipe("Tiny", tmp_path / "checkpoint", tokenizer=False), store)
    again(published, store, large=0)
    assert looked == [3, proof.SAMPLED + 1]
    monkeypatch.setattr(proof, "SAMPLED_BYTES", 0)
    again(published, store, large=0)
    largest = max(sum(file.size for file in published.manifest.block_files(block)) for block in range(7))
    assert (len(looked) == 3) == (largest + 32 * 48 * 4 <= 2 * largest)


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_part_by_part_where_memory_is_short(layers_per_block: int, folder: Path, store: Store) -> None:
    published = publish(Recipe("Tiny", folder, layers_per_block=layers_per_block), store)
    seen: list[tuple[int, int]] = []
    found = again(published, store, memory=0, report=lambda *step: seen.append(step))
    blocks = len(published.manifest.blocks)
    assert found.streamed and found.parts == blocks
    assert found.outcomes[0].exact
    assert seen == [(number, blocks) for number in range(blocks + 1)]
    whole = again(published, store, memory=1 << 40)
    assert not whole.streamed and whole.parts == 3
    assert whole.samples == found.samples


def test_streaming_never_holds_two_parts(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model and the parts: what is mapped at a time are the files of one block."""
    published = publish(Recipe("Tiny", folder), store)
    most = 0
    load = weights.load_block

    def counting(*arguments: Any) -> Any:
        nonlocal most
        loaded = load(*arguments)
        most = max(most, sum(key[0].is_relative_to(store.blocks) for key in list(weights._in_use)))  # type: ignore[attr-defined]
        return loaded

    monkeypatch.setattr(weights, "load_block", counting)
    again(published, store, memory=0)
    largest = max(len(block.files) for block in published.manifest.blocks)
    assert most <= largest
    again(published, store, memory=1 << 40)
    assert most == len(published.manifest.files)


@pytest.mark.parametrize("kind", sorted(TINY))
def test_any_kind_of_model(kind: str, tmp_path: Path, store: Store) -> None:
    config = tmp_path / "config.json"
    AutoConfig.for_model(kind, **TINY[kind]).save_pretrained(tmp_path)
    published = publish(Recipe(kind, config=config, tokenizer=False), store)
    sidecar = sidecar_of(published, store)
    assert sidecar.outcomes[0].exact
    assert len(sidecar.samples) == len(published.manifest.sides)
    assert bool(sidecar.samples[-1].encoded) == (len(sidecar.samples) > 1)
    streamed = again(published, store, memory=0)
    assert streamed.outcomes[0].exact and streamed.samples == sidecar.samples


def test_an_interrupted_proof_is_taken_up(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block files wait for the next run, which writes none of them again; until then nobody sees them."""

    def stop(done: int, total: int, what: str) -> None:
        if what == "proof" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(Recipe("Tiny", folder), store, stop)
    assert not store.held() and not list(store.models.iterdir()) and not (store.data / "sidecars").exists()
    assert list((store.data / "publishing").glob("*.safetensors"))
    monkeypatch.setattr("torrentlm.publish.publish.write_block", None)
    published = publish(Recipe("Tiny", folder), store)
    assert published.sidecar is not None and published.sidecar.outcomes[0].exact


# -- What is refused.


def refused(folder: Path, store: Store, match: str) -> None:
    before = listing(store.data)
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        publish(Recipe("Tiny", folder), store)
    assert "\n" not in str(caught.value)
    assert listing(store.data) == before


def test_parts_that_compute_something_else(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Forward = chain.to_wire

    def to_wire(result: Any) -> Any:
        packed = original(result)
        return (replace(packed[0], data=bytes(4) + bytes(packed[0].data)[4:]), *packed[1:])

    monkeypatch.setattr(chain, "to_wire", to_wire)
    refused(folder, store, "cut into parts it does not compute what it computes as a whole")


def test_parts_that_do_not_run(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: Any, **more: Any) -> Any:
        raise RefusedError("The step could not be computed: no such thing", "internal")

    monkeypatch.setattr(SpanRunner, "forward", forward)
    refused(folder, store, "does not run .*no such thing")


def test_a_cache_that_forgets(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in the prompt, wrong in the tokens behind it."""
    original: Forward = SpanRunner.forward

    def forward(self: SpanRunner, cache: Any, given: Any, tokens: int, **more: Any) -> Any:
        if tokens == 1:
            cache = self.open(cache.batch, cache.max_length)
        return original(self, cache, given, tokens, **more)

    monkeypatch.setattr(SpanRunner, "forward", forward)
    refused(folder, store, "does not compute what it computes as a whole")


def test_a_weight_that_no_block_has(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that overlooks a weight: the parts compute with zeros, the whole with NaN, and so nobody agrees."""
    from torrentlm.compute import splitter as splitting

    original = splitting.analyse_sides

    def overlooking(config: PretrainedConfig, *hints: Any) -> Any:
        sides = original(config, *hints)
        return tuple(replace(split, head=tuple(name for name in split.head if "norm" not in name)) for split in sides)

    monkeypatch.setattr("torrentlm.publish.publish.analyse_sides", overlooking)
    refused(folder, store, "differ by inf")


def test_a_whole_model_that_fails(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = LlamaMLP.forward

    def forward(self: LlamaMLP, values: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += values.dtype == torch.float32 and not self.up_proj.weight.is_meta and bool(values.any())
        if calls > 1:
            raise RuntimeError("this machine lacks something")
        return original(self, values)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    refused(folder, store, "this machine lacks something")


@pytest.mark.parametrize("along", [0, 1, 2])
def test_parts_are_compared_along_the_tokens_wherever_these_are(along: int) -> None:
    whole = torch.rand(4, 40, 3).transpose(1, along)
    last = whole.narrow(along, 32, 8).clone()
    assert not in_parts._differ(whole, last, [18, 14, 8])
    other = last.clone()
    other[(-1, -1, -1)] += 0.1
    assert in_parts._differ(whole, other, [18, 14, 8])
    assert not in_parts._differ(whole[:, :2], other, [18, 14, 8])  # not of each token
