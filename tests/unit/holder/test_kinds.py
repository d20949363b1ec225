"""Sessions on models of other kinds than a plain decoder: two sides, a state that cannot be cut, an encoder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trio
from transformers import PreTrainedModel

from tests.unit.compute.checkpoints import greedy, prefill
from tests.unit.compute.kinds import KINDS, ids, mask_of
from tests.unit.holder.chain import CLIENT, Chain, open_chain, publish_model, session_on
from torrentlm.client.session import RemoteSession
from torrentlm.compute.border import pack, unpack
from torrentlm.errors import RefusedError, RemoteProtocolError
from torrentlm.publish.published import Published
from torrentlm.records import Sampling, Span, Stop
from torrentlm.route.plan import Hop
from torrentlm.structured import single_error
from torrentlm.wire.messages import Encoded, Fail, Output, Step, Want
from torrentlm.wire.tensors import Tensor

VOCABULARY = 101


@dataclass(frozen=True)
class Kept:
    whole: PreTrainedModel
    published: Published
    paths: dict[str, Path]

    @property
    def id(self) -> bytes:
        return self.published.magnet.v2 or b""

    def hops(self, chain: Chain, side: int) -> list[Hop]:
        blocks = self.published.manifest.side_blocks(side)
        return [hop for hop in chain.hops if hop.span.first in blocks]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kept]:
    known: dict[str, Kept] = {}

    def get(name: str) -> Kept:
        if name not in known:
            folder = tmp_path_factory.mktemp("kept")
            whole = KINDS[name].build()
            whole.generation_config.decoder_start_token_id = 0
            whole.save_pretrained(folder / "checkpoint")
            known[name] = Kept(whole, *publish_model(folder / "checkpoint", folder / "data"))
        return known[name]

    return get


def run(kept: Kept, spans: list[Span], body: Callable[[Chain], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60), single_error():
            async with open_chain(kept.published, kept.paths, spans) as chain:
                await body(chain)

    with single_error():
        trio.run(main)


async def generate(session: RemoteSession, rows: list[list[int]], count: int, **options: object) -> torch.Tensor:
    how: dict[str, object] = {"sampling": Sampling(), "stop": Stop()} | options
    steps = session.generate(rows, max_new_tokens=count, **how)  # type: ignore[arg-type]
    return torch.tensor([token.tokens async for token in steps]).T


TEXT = ids(2, 9, 4)
TWO_SIDES = [Span(0, 3), Span(4, 7), Span(8, 9), Span(10, 10), Span(11, 12)]
"""Of a model of six layers and three: an encoder on two holders, a decoder on three."""


async def encoded(chain: Chain, kept: Kept, pads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    hops = kept.hops(chain, 0)
    async with session_on(chain, kept.id, batch=2, max_length=9, pads=pads, hops=hops, vocabulary=32) as session:
        states = await session.step(TEXT.tolist(), want=Want.LOGITS_ALL)
    return states, pack(mask_of(pads or (0, 0), 9).bool())


@pytest.mark.parametrize("pads", [(0, 0), (-3, 0), (2, -1)], ids=str)
def test_an_encoder_and_a_decoder_over_holders_are_the_whole_model(
    published: Callable[[str], Kept], pads: tuple[int, ...]
) -> None:
    kept = published("two sides")
    expected = greedy(kept.whole, TEXT, 12, mask_of(pads, 9))

    async def body(chain: Chain) -> None:
        made = await encoded(chain, kept, pads)
        hops = kept.hops(chain, 1)
        assert [str(hop.span) for hop in hops] == ["8-9", "10", "11-12"]
        async with session_on(chain, kept.id, batch=2, hops=hops, encoded=made) as session:
            assert torch.equal(await generate(session, [[0], [0]], 12), expected)
            again = await generate(session, [[0], [0]], 5, position=0)
            assert torch.equal(again, expected[:, :5])

    run(kept, TWO_SIDES, body)


def test_steps_that_overtake_what_the_encoder_made_wait_for_it(published: Callable[[str], Kept]) -> None:
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        made = await encoded(chain, kept, (0, 0))
        held: list[tuple[object, Encoded]] = []
        carry = chain.carry

        async def late(sender: object, receiver: object, message: object) -> None:
            if isinstance(message, Encoded):
                held.append((receiver, message))
            else:
                await carry(sender, receiver, message)  # type: ignore[arg-type]

        chain.carry = late  # type: ignore[method-assign, assignment]
        options = {"batch": 2, "hops": kept.hops(chain, 1), "encoded": made}
        async with session_on(chain, kept.id, **options) as session, trio.open_nursery() as nursery:
            found: list[torch.Tensor] = []

            async def ask() -> None:
                found.append(await generate(session, [[0], [0]], 6))

            nursery.start_soon(ask)
            await trio.sleep(0.3)
            assert len(held) == 3 and not found
            for receiver, message in reversed(held):
                await carry(CLIENT, receiver, message)  # type: ignore[arg-type]
        assert torch.equal(found[0], greedy(kept.whole, TEXT, 6))

    run(kept, TWO_SIDES, body)


def test_a_step_waits_for_it_no_longer_than_it_should(
    published: Callable[[str], Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torrentlm.holder.service.CLIENT_WAIT_S", 0.1)
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        states, mask = await encoded(chain, kept, (0, 0))
        hops = kept.hops(chain, 1)[:1]
        carry = chain.carry

        async def lost(sender: object, receiver: object, message: object) -> None:
            if not isinstance(message, Encoded):
                await carry(sender, receiver, message)  # type: ignore[arg-type]

        chain.carry = lost  # type: ignore[method-assign, assignment]
        with pytest.raises(RefusedError, match="never told what the encoder made"):
            async with session_on(chain, kept.id, batch=2, hops=hops, encoded=(states, mask)) as session:
                await session.step([[0], [0]])

    run(kept, TWO_SIDES, body)


def hostile(states: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    return {
        "nothing": (),
        "no mask": (states,),
        "one too many": (states, mask, mask),
        "another batch": (states[:1], mask[:1]),
        "another length": (states[:, :-1], mask[:, :-1]),
        "another width": (states[..., :-1], mask),
        "a longer mask": (states, torch.cat([mask, mask], 1)),
        "integers": (states.long(), mask),
        "changed places": (mask, states),
    }


@pytest.mark.parametrize("what", hostile(torch.zeros(2, 9, 32), torch.ones(2, 9)))
def test_what_no_encoder_made_for_this_session_ends_it_and_no_other(
    published: Callable[[str], Kept], what: str
) -> None:
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        made = await encoded(chain, kept, (0, 0))
        bad = tuple(map(pack, hostile(unpack(made[0]), unpack(made[1]))[what]))
        hops = kept.hops(chain, 1)
        options = {"batch": 2, "hops": hops, "encoded": made}
        async with session_on(chain, kept.id, **options) as healthy, session_on(chain, kept.id, **options) as hurt:
            await chain.carry(CLIENT, hops[1].node, Encoded(hurt.handles.ids[1], bad))
            with pytest.raises((RefusedError, RemoteProtocolError)):
                await hurt.step([[0], [0]])
            assert chain.holders[hops[1].node].sessions == 1
            assert torch.equal(await generate(healthy, [[0], [0]], 4), greedy(kept.whole, TEXT, 4))

    run(kept, TWO_SIDES, body)


def test_what_an_encoder_made_comes_from_the_client_alone(published: Callable[[str], Kept]) -> None:
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        made = await encoded(chain, kept, (0, 0))
        hops = kept.hops(chain, 1)
        async with session_on(chain, kept.id, batch=2, hops=hops, encoded=made) as session:
            nonsense = Encoded(session.handles.ids[1], (made[0],))
            await chain.carry(hops[0].node, hops[1].node, nonsense)
            assert torch.equal(await generate(session, [[0], [0]], 4), greedy(kept.whole, TEXT, 4))

    run(kept, TWO_SIDES, body)


def test_a_decoder_without_and_an_encoder_with_a_source_are_refused(published: Callable[[str], Kept]) -> None:
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        made = await encoded(chain, kept, (0, 0))
        with pytest.raises(RefusedError, match="how much the encoder has read"):
            async with session_on(chain, kept.id, hops=kept.hops(chain, 1)):
                pass
        with pytest.raises(RefusedError, match="how much the encoder has read"):
            async with session_on(chain, kept.id, hops=kept.hops(chain, 0), encoded=made):
                pass

    run(kept, TWO_SIDES, body)


def test_blocks_of_two_sides_are_no_hop(published: Callable[[str], Kept]) -> None:
    kept = published("two sides")

    async def body(chain: Chain) -> None:
        with pytest.raises(RefusedError, match="a hop has those of one") as refused:
            async with session_on(chain, kept.id):
                pass
        assert refused.value.code == "no_block"

    run(kept, [Span(0, 12)], body)


STEPWISE = ["state space", "shared modules"]


@pytest.mark.parametrize("name", STEPWISE)
def test_a_state_that_cannot_be_cut_goes_on_token_by_token(published: Callable[[str], Kept], name: str) -> None:
    kept = published(name)
    manifest = kept.published.manifest
    assert not manifest.sides[0].chunks
    assert {block.rewind for block in manifest.blocks if block.layers} == {"snapshot"}
    prompt, more = ids(1, 20, 1), ids(1, 3, 2)

    async def body(chain: Chain) -> None:
        options = {"vocabulary": VOCABULARY, "whole": True, "single": True}
        async with session_on(chain, kept.id, **options) as session:
            first = await generate(session, prompt.tolist(), 6)
            assert torch.equal(first, greedy(kept.whole, prompt, 6))
            turn = torch.cat([first[:, -1:], more], dim=1)
            second = await generate(session, turn.tolist(), 6)
            text = torch.cat([prompt, first, more], dim=1)
            assert torch.equal(second, greedy(kept.whole, text, 6))
            last = unpack(await session.step(more.tolist(), want=Want.LOGITS_LAST, position=0))
            torch.testing.assert_close(last, prefill(kept.whole, more), rtol=1e-4, atol=1e-4)

    run(kept, [Span(0, 2), Span(3, 7)], body)


def test_several_tokens_at_once_are_refused_there_instead_of_being_wrong(published: Callable[[str], Kept]) -> None:
    kept = published("state space")

    async def body(chain: Chain) -> None:
        async with session_on(chain, kept.id, vocabulary=VOCABULARY, whole=True) as session:
            await session.step([[5, 6, 7]])
            with pytest.raises(RefusedError, match="one token at a time"):
                await session.step([[8, 9]])

    run(kept, [Span(0, 2), Span(3, 7)], body)


def test_a_prompt_reaches_only_the_holders_that_need_its_ids(published: Callable[[str], Kept]) -> None:
    kept = published("plain")

    async def body(chain: Chain) -> None:
        async with session_on(chain, kept.id, vocabulary=VOCABULARY) as session:
            await session.step([[5, 6, 7]], want=Want.LOGITS_LAST)
        for node, message in chain.sent:
            if isinstance(message, Step) and node != chain.hops[0].node:
                assert [tensor.dtype for tensor in message.tensors] == ["F32"]
        assert not any(isinstance(message, Fail) for _, message in chain.sent)
        assert sum(isinstance(message, Output) for _, message in chain.sent) == 1

    run(kept, [Span(0, 2), Span(3, 4), Span(5, 7)], body)
