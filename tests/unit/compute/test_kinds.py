"""Every kind of model in three spans against itself in one: the same bits, tokens and sentence embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.unit.compute.checkpoints import MASKED, SEQ2SEQ, Blocks, Chain, cut, greedy, prefill
from tests.unit.compute.kinds import KINDS, WINDOW, ids, mask_of
from torrentlm.compute.inputs import Encoded
from torrentlm.compute.split import Hints
from torrentlm.errors import RefusedError
from torrentlm.wire.messages import Want

DECODERS = [name for name, kind in KINDS.items() if kind.auto not in (MASKED, SEQ2SEQ)]
ENCODERS = [name for name, kind in KINDS.items() if kind.auto is MASKED]
ONE, PAIR, LONG = ids(1, 11, 1), ids(2, 9, 2), ids(1, 2 * WINDOW + 5, 3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_thirds_are_the_whole(name: str, tmp_path: Path) -> None:
    model = KINDS[name].build()
    thirds = cut(model, tmp_path).thirds()
    assert torch.equal(Chain(thirds, 1, 64).step(ONE), prefill(model, ONE))
    assert torch.equal(Chain(thirds, 1, 64).greedy(ONE, 12), greedy(model, ONE, 12))
    assert torch.equal(Chain(thirds, 1, 64).greedy(LONG, 6), greedy(model, LONG, 6))
    pads = (4, 0)
    assert torch.equal(Chain(thirds, 2, 64, pads).greedy(PAIR, 8), greedy(model, PAIR, 8, mask_of(pads, 9)))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_prompt_in_parts_is_the_prompt(name: str, tmp_path: Path) -> None:
    model = KINDS[name].build()
    chain = Chain(cut(model, tmp_path).thirds(), 1, 64)
    parts = chain.runners[0].split.chunks
    assert parts == (name not in ("state space", "shared modules"))  # these begin anew with whatever is no single token
    for start, stop in ((0, 10), (10, 16), (16, 21)) if parts else ((0, 19), (19, 20), (20, 21)):
        logits = chain.step(LONG[:, start:stop])
    torch.testing.assert_close(logits, prefill(model, LONG), rtol=1e-4, atol=1e-4)
    if not parts:
        with pytest.raises(RefusedError, match="one token at a time"):
            chain.step(LONG[:, :2])


@pytest.mark.parametrize("pads", [(), (4, 0), (-4, 0), (-2, -5), (3, -3)], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_thirds_are_the_whole_with_padding_on_either_side(
    name: str, pads: tuple[int, ...], tmp_path: Path
) -> None:
    model = KINDS[name].build()
    mask = mask_of(pads or (0, 0), 9)
    with torch.no_grad():
        whole = model(input_ids=PAIR, **({"attention_mask": mask} if pads else {})).logits
    blocks = cut(model, tmp_path, Hints(encoder=True))
    found = Chain(blocks.thirds(), 2, 9, pads).step(PAIR, Want.LOGITS_ALL)
    assert found.shape == whole.shape and torch.equal(found[mask.bool()], whole[mask.bool()])


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Blocks]:
    model = KINDS["two sides"].build()
    model.generation_config.decoder_start_token_id = 0
    return model, cut(model, tmp_path_factory.mktemp("sides"))


def decoding(blocks: Blocks, text: torch.Tensor, pads: tuple[int, ...]) -> Chain:
    """A decoder's chain that has been given what an encoder's made."""
    batch, tokens = text.shape
    states = Chain(blocks.thirds(side=0), batch, tokens, pads).step(text, Want.LOGITS_ALL)
    return Chain(blocks.thirds(side=1), batch, 64, (), Encoded(states, mask_of(pads or (0,) * batch, tokens)))


@pytest.mark.parametrize("pads", [(), (4, 0), (-4, 0), (-2, -5)], ids=str)
def test_both_sides_in_thirds_are_the_whole(sides: tuple[PreTrainedModel, Blocks], pads: tuple[int, ...]) -> None:
    model, blocks = sides
    mask = mask_of(pads or (0, 0), 9)
    start = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        whole = model(input_ids=PAIR, attention_mask=mask, decoder_input_ids=start).logits
    assert torch.equal(decoding(blocks, PAIR, pads).step(start), whole)
    assert torch.equal(decoding(blocks, PAIR, pads).greedy(start, 12), greedy(model, PAIR, 12, mask))


def test_a_decoder_goes_back_and_reorders_with_what_the_encoder_made(sides: tuple[PreTrainedModel, Blocks]) -> None:
    blocks = sides[1]
    more = ids(2, 3, 5)
    chain = decoding(blocks, PAIR, (4, 0))
    chain.step(more)
    chain.step(ids(2, 2, 6))
    chain.trim(3)
    chain.reorder([1, 1])
    picked = decoding(blocks, PAIR[[1, 1]], ())
    picked.step(more[[1, 1]])
    torch.testing.assert_close(chain.step(more), picked.step(more), rtol=1e-5, atol=1e-5)
    chain.trim(0)
    again = decoding(blocks, PAIR[[1, 1]], ())
    torch.testing.assert_close(chain.step(more), again.step(more), rtol=1e-5, atol=1e-5)
