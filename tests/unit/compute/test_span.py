"""Spans of a model one after the other compute what the whole model computes: the same bits, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.unit.compute.checkpoints import Blocks, Chain, cut, greedy, prefill, tiny
from torrentlm.compute.border import ABSENT, Border, Logits
from torrentlm.errors import ArtifactError, LocalProtocolError, RefusedError, RemoteProtocolError
from torrentlm.wire.messages import Want

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256},
    "mixtral": {},
}
IDS = torch.randint(3, 101, (1, 11), generator=torch.Generator().manual_seed(1))
PAIR = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(2))
PADS = (4, 0)
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="module")
def blocks(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return cut(model, tmp_path_factory.mktemp("blocks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=["gqa", "tied", "mha"]
)
def test_thirds_are_the_whole_to_the_bit(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(dtype=dtype, **settings)
    thirds = cut(model, tmp_path).thirds(dtype)
    assert torch.equal(Chain(thirds, 1, 64).step(IDS), prefill(model, IDS))
    assert torch.equal(Chain(thirds, 1, 64).greedy(IDS, 24), greedy(model, IDS, 24))
    assert torch.equal(Chain(thirds, 2, 64, PADS).greedy(PAIR, 24), greedy(model, PAIR, 24, MASK))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_split_by_the_same_rules(family: str, tmp_path: Path) -> None:
    model = tiny(family, **FAMILIES[family])
    thirds = cut(model, tmp_path).thirds()
    assert torch.equal(Chain(thirds, 1, 64).step(IDS), prefill(model, IDS))
    assert torch.equal(Chain(thirds, 1, 64).greedy(IDS, 24), greedy(model, IDS, 24))
    assert torch.equal(Chain(thirds, 2, 64, PADS).greedy(PAIR, 24), greedy(model, PAIR, 24, MASK))


def test_stem_and_head_may_be_spans_of_their_own(model: PreTrainedModel, blocks: Blocks) -> None:
    spans = [
        blocks.runner(0, -1, has_head=False),
        blocks.runner(0, 0, has_stem=False),
        blocks.runner(1, 4),
        blocks.runner(5, 5, has_head=False),
        blocks.runner(6, 5, has_stem=False, has_head=True),
    ]
    assert torch.equal(Chain(spans, 1, 64).greedy(IDS, 12), greedy(model, IDS, 12))
    # Prefilled in chunks whose logits nobody wants, the head is not run at all.
    chain = Chain(spans, 1, 64)
    assert chain.step(IDS[:, :7], Want.NONE).shape == (1, 7, 32)
    assert chain.step(IDS[:, 7:]).shape == (1, 1, 101)


def test_mixed_step_sizes_and_one_of_no_tokens(model: PreTrainedModel, blocks: Blocks) -> None:
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    chain = Chain(blocks.thirds(), 1, 64)
    parts = [chain.step(IDS[:, start:stop], Want.LOGITS_ALL) for start, stop in [(0, 4), (4, 4), (4, 5), (5, 11)]]
    assert [part.shape[1] for part in parts] == [4, 0, 1, 6]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    assert [cache.length for cache in chain.caches] == [11, 11, 11]
    nothing = Chain(blocks.thirds(), 1, 64).step(IDS[:, :0], Want.HIDDEN)
    assert nothing.shape == (1, 0, 32)


def test_trimmed_and_stepped_again_is_a_fresh_run(blocks: Blocks) -> None:
    spans = blocks.thirds()
    chain = Chain(spans, 1, 64)
    chain.step(IDS[:, :2])
    chain.step(IDS[:, 2:])
    chain.trim(2)
    fresh = Chain(spans, 1, 64)
    fresh.step(IDS[:, :2])
    assert torch.equal(chain.step(PAIR[:1]), fresh.step(PAIR[:1]))
    chain.trim(50)  # nothing to forget
    assert chain.caches[0].length == 11


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads share a product's rows out, so with several a row's place in the batch decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pads", [(), (4, 0)], ids=["even", "padded"])
def test_reordered_rows_go_on_as_the_rows_they_were(blocks: Blocks, pads: tuple[int, ...]) -> None:
    spans = blocks.thirds()
    straight, crossed = Chain(spans, 2, 64, pads), Chain(spans, 2, 64, pads)
    straight.step(PAIR)
    crossed.step(PAIR)
    crossed.reorder([1, 0])
    more = PAIR[:, :3]
    assert torch.equal(crossed.step(more.flip(0)), straight.step(more).flip(0))


def test_a_sliding_window_that_has_moved_on_cannot_go_back(tmp_path: Path) -> None:
    chain = Chain(cut(tiny("gemma2", **FAMILIES["gemma2"]), tmp_path).thirds(), 1, 64)
    chain.step(IDS)
    with pytest.raises(RefusedError) as refused:
        chain.trim(2)
    assert refused.value.code == "bad_request"
    assert chain.caches[0].length == 11  # and the session may go on


def test_logits_are_computed_for_the_wanted_positions_only(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[int] = []
    linear = torch.nn.functional.linear

    def counting(given: torch.Tensor, weight: torch.Tensor, *more: Any) -> torch.Tensor:
        if weight.shape[0] == 101:
            positions.append(given.shape[1])
        return linear(given, weight, *more)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    chain = Chain(blocks.thirds(), 1, 64)
    for want in (Want.NONE, Want.HIDDEN, Want.LOGITS_LAST, Want.SAMPLE, Want.LOGITS_ALL):
        chain.step(IDS, want)
    assert positions == [1, 1, 11]


def test_what_does_not_fit_is_refused_before_anything_changes(blocks: Blocks) -> None:
    first, middle, _ = blocks.thirds()
    cache, behind = first.open(1, 12), middle.open(1, 12)
    border = first.forward(cache, IDS, 11)
    assert isinstance(border, Border)
    with pytest.raises(RefusedError) as refused:
        first.forward(cache, IDS[:, :2], 2)
    assert refused.value.code == "max_length"
    hostile: list[tuple[Any, type[Exception]]] = [
        (IDS.float(), RemoteProtocolError),
        (IDS[0], RemoteProtocolError),
        (IDS.repeat(2, 1), RemoteProtocolError),
        (torch.tensor([[101]]), RemoteProtocolError),
        (torch.tensor([[-1]]), RemoteProtocolError),
        (border, RemoteProtocolError),
    ]
    for given, error in hostile:
        with pytest.raises(error):
            first.forward(cache, given, 1)
    for tokens in (0, 2):
        with pytest.raises(RemoteProtocolError):
            first.forward(first.open(1, 12), IDS[:, :1], tokens)
    hidden = border.tensors[0]
    for tensors in [
        (hidden[..., :31],),
        (hidden.long(),),
        (hidden.bool(),),
        (hidden, hidden),
        (hidden[0],),
        (hidden[:, :10],),
        (hidden.repeat(2, 1, 1),),
        (hidden[..., None],),
        (ABSENT,),  # only what the stem makes may be missing
        (),
    ]:
        with pytest.raises(RemoteProtocolError):
            middle.forward(behind, Border(tensors), 11)
    with pytest.raises(RemoteProtocolError):
        middle.forward(behind, IDS, 11)
    assert (cache.length, behind.length) == (11, 0)
    assert isinstance(middle.forward(behind, border, 11), Border)


def test_a_peer_may_send_activations_in_another_precision(blocks: Blocks) -> None:
    first, middle, last = blocks.thirds()
    border = first.forward(first.open(1, 64), IDS, 11)
    assert isinstance(border, Border)
    half = Border(tuple(tensor.bfloat16() for tensor in border.tensors))
    result = middle.forward(middle.open(1, 64), half, 11)
    assert isinstance(result, Border) and result.tensors[0].dtype == torch.float32
    assert isinstance(last.forward(last.open(1, 64), result, 11, want=Want.SAMPLE), Logits)


def test_a_step_that_fails_half_way_ends_the_session(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = blocks.runner(0, 1)
    cache = runner.open(1, 64)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory left\nwith a long story behind")

    with monkeypatch.context() as broken:
        broken.setattr(torch.nn.functional, "silu", fail)
        with pytest.raises(RefusedError, match=r"could not be computed: no memory left$"):
            runner.forward(cache, IDS, 11)
    with pytest.raises(RefusedError, match="new session"):
        runner.forward(cache, IDS, 11)
    assert isinstance(runner.forward(runner.open(1, 64), IDS, 11), Border)


def test_sessions_that_make_no_sense(blocks: Blocks) -> None:
    runner = blocks.runner(0, 1)
    for arguments in [(0, 8), (1, 0), (2, 8, (1,)), (1, 8, (8,)), (1, 8, (-8,))]:
        with pytest.raises(RefusedError):
            runner.open(*arguments)
    cache = runner.open(2, 8)
    for rows in ([0], [0, 2], [-1, 0]):
        with pytest.raises(RefusedError):
            runner.reorder(cache, rows)


def test_spans_that_make_no_sense(blocks: Blocks) -> None:
    for first, last, ends in [
        (0, 6, {}),
        (3, 1, {}),
        (2, 1, {"has_stem": False, "has_head": False}),
        (1, 2, {"has_stem": True}),
        (1, 2, {"has_head": True}),
    ]:
        with pytest.raises((LocalProtocolError, ArtifactError)):
            blocks.runner(first, last, **ends)


def test_the_cache_takes_what_was_said(blocks: Blocks) -> None:
    runner = blocks.runner(0, 1)
    heads, width = 2, 8
    assert runner.cache_bytes(2, 64) == 2 * (2 * heads * width) * 2 * 64 * 4
    cache = runner.open(2, 64)
    runner.forward(cache, PAIR, 9)
    reserved = [layer._all_keys.nbytes + layer._all_values.nbytes for layer in cache.states.layers[:2]]
    assert sum(reserved) == runner.cache_bytes(2, 64)
    foreign = {id(layer): layer for layer in cache.states.layers[2:]}
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in foreign.values()) < 200
