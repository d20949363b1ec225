"""Holders and a client's sessions through them, against transformers on the same weights."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.lowlevel
import trio.testing
from transformers import PreTrainedModel

from tests.unit.holder.chain import CLIENT, Chain, open_chain, publish_model, save_model, session_on
from torrentlm.client.handles import Opening
from torrentlm.client.session import RemoteSession
from torrentlm.compute.border import unpack
from torrentlm.errors import HolderLostError, LocalProtocolError, RefusedError
from torrentlm.holder.execution import Execution, Result
from torrentlm.publish.published import Published
from torrentlm.records import Sampling, SessionId, Span, Stop
from torrentlm.structured import single_error
from torrentlm.wire.ids import ids_tensor
from torrentlm.wire.messages import Close, Fail, Generate, Halt, Step, Token, Want
from torrentlm.wire.tensors import Tensor

THIRDS = [Span(0, 2), Span(3, 4), Span(5, 7)]
PROMPT = [5, 17, 3, 80, 41]


@dataclass(frozen=True)
class Tiny:
    whole: PreTrainedModel
    published: Published
    paths: dict[str, Path]

    @property
    def id(self) -> bytes:
        return self.published.magnet.v2 or b""

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = self.whole.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return whole[0, len(prompt) :].tolist()

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            return self.whole(torch.tensor(rows)).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    whole = save_model(folder / "checkpoint")
    yield Tiny(whole, *publish_model(folder / "checkpoint", folder / "data"))


def run(
    tiny: Tiny, body: Callable[[Chain], Awaitable[None]], spans: list[Span] = THIRDS, kv_budget: int = 1 << 24
) -> None:
    async def main() -> None:
        with trio.fail_after(60), single_error():
            async with open_chain(tiny.published, tiny.paths, spans, kv_budget=kv_budget) as chain:
                await body(chain)

    with single_error():
        trio.run(main)


async def generate(session: RemoteSession, prompt: list[int], count: int, **options: object) -> list[Token]:
    how: dict[str, object] = {"sampling": Sampling(), "stop": Stop()} | options
    return [token async for token in session.generate([prompt], max_new_tokens=count, **how)]  # type: ignore[arg-type]


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.tokens[0] for token in tokens]


@pytest.mark.parametrize("spans", [THIRDS, [Span(0, 7)], [Span(0, 0), Span(1, 6), Span(7, 7)]], ids=str)
def test_greedy_tokens_are_those_of_the_whole_model(tiny: Tiny, spans: list[Span]) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            tokens = await generate(session, PROMPT, 24)
        assert ids_of(tokens) == tiny.greedy(PROMPT, 24)
        assert [token.index for token in tokens] == list(range(24))
        assert [token.finish for token in tokens] == [None] * 23 + ["length"]

    run(tiny, body, spans)


def test_the_client_is_not_in_the_token_loop(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            await generate(session, PROMPT, 10)
        to_stem = [message for node, message in chain.sent if node == chain.hops[0].node and isinstance(message, Step)]
        assert [step.position for step in to_stem] == [0, *range(5, 14)]

    run(tiny, body)


def test_a_seed_gives_the_same_tokens_on_every_route(tiny: Tiny) -> None:
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=11)
    found = []

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            found.append(ids_of(await generate(session, PROMPT, 20, sampling=sampling, history=[PROMPT])))

    for spans in (THIRDS, [Span(0, 7)], [Span(0, 3), Span(4, 7)]):
        run(tiny, body, spans)
    assert found[0] == found[1] == found[2]
    assert found[0] != tiny.greedy(PROMPT, 20)


def test_a_stop_token_ends_the_run_and_reaches_every_holder(tiny: Tiny) -> None:
    expected = tiny.greedy(PROMPT, 24)
    stop = Stop(tokens=(expected[6],))

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            tokens = await generate(session, PROMPT, 24, stop=stop)
            assert tokens[-1].finish == "stop_token"
            assert ids_of(tokens) == expected[: expected.index(expected[6]) + 1]
            with trio.fail_after(5):
                while sum(isinstance(message, Halt) for _, message in chain.sent) < 3:
                    await trio.sleep(0.01)
        halted = [node for node, message in chain.sent if isinstance(message, Halt)]
        assert halted == [chain.hops[0].node, chain.hops[1].node, chain.hops[2].node]

    run(tiny, body)


def test_a_long_prompt_goes_in_chunks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torrentlm.client.session.PREFILL_CHUNK", 4)
    prompt = [(7 * number) % 90 + 3 for number in range(18)]

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            assert ids_of(await generate(session, prompt, 8)) == tiny.greedy(prompt, 8)
        to_last = [message for node, message in chain.sent if node == chain.hops[2].node and isinstance(message, Step)]
        assert [step.tokens for step in to_last] == [4, 4, 4, 4, 2, *[1] * 7]

    run(tiny, body)


def test_a_second_turn_goes_on_from_the_cache(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            first = ids_of(await generate(session, PROMPT, 8))
            assert session.length == len(PROMPT) + 7
            second = ids_of(await generate(session, [first[-1], 9, 9], 8))
        assert second == tiny.greedy([*PROMPT, *first, 9, 9], 8)

    run(tiny, body)


def test_leaving_early_cancels_and_the_session_goes_on(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            steps = session.generate([PROMPT], max_new_tokens=100, sampling=Sampling(), stop=Stop())
            seen = [(await anext(steps)).tokens[0] for _ in range(3)]
            await steps.aclose()
            with trio.fail_after(5):
                while sum(isinstance(message, Halt) for _, message in chain.sent) < 3:
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked(0.05)
            before = len(chain.sent)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(chain.sent) == before
            assert seen == tiny.greedy(PROMPT, 3)
            again = ids_of(await generate(session, [seen[-1]], 6, position=len(PROMPT) + 2))
        assert again == tiny.greedy([*PROMPT, *seen], 6)

    run(tiny, body)


def test_a_new_turn_at_once_after_a_cancel_finds_the_session_alive(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head may still compute a step of the run that was cancelled when it is told what to sample in the next."""
    expected = tiny.greedy(PROMPT, 3)
    whole = Execution.run

    def slowly(self: Execution, step: Step) -> Result:
        if self.is_head:
            time.sleep(0.1)
        return whole(self, step)

    monkeypatch.setattr(Execution, "run", slowly)

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            for _ in range(3):
                steps = session.generate([PROMPT], position=0, max_new_tokens=100, sampling=Sampling(), stop=Stop())
                assert (await anext(steps)).tokens[0] == expected[0]
                await trio.sleep(0.03)  # the next token's step is at the head now
                await steps.aclose()
            assert ids_of(await generate(session, PROMPT, 3, position=0)) == expected
            assert all(holder.sessions == 1 for holder in chain.holders.values())

    run(tiny, body)


def test_stepping_mixes_sizes_rolls_back_and_takes_nothing(tiny: Tiny) -> None:
    text = [5, 17, 3, 80, 41, 2, 2, 60, 61, 62]

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            parts = []
            for part in (text[:4], [], text[4:5], text[5:]):
                parts.append(unpack(await session.step([part])))
            assert [part.shape[1] for part in parts] == [4, 0, 1, 5]
            torch.testing.assert_close(torch.cat(parts, 1), tiny.logits([text]), rtol=1e-4, atol=1e-4)
            again = unpack(await session.step([[7, 8, 9]], position=2))
            assert session.length == 5
        async with session_on(chain, tiny.id) as session:
            await session.step([text[:2]])
            fresh = unpack(await session.step([[7, 8, 9]]))
        torch.testing.assert_close(again, fresh, rtol=1e-5, atol=1e-5)

    run(tiny, body)


def test_a_long_text_goes_in_chunks_with_few_of_them_under_way(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torrentlm.client.session.PREFILL_CHUNK", 3)
    monkeypatch.setattr("torrentlm.client.session.OUTPUT_BYTES", 4 * 97 * 2 * 5)  # logits of two rows of five
    monkeypatch.setattr("torrentlm.holder.service.MAX_QUEUED_STEPS", 5)
    rows = [[(7 * row + 5 * at) % 97 for at in range(61)] for row in range(2)]

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            assert ids_of(await generate(session, rows[0], 12)) == tiny.greedy(rows[0], 12)
        async with session_on(chain, tiny.id, batch=2) as session:
            every = unpack(await session.step(rows))
            torch.testing.assert_close(every, tiny.logits(rows), rtol=1e-4, atol=1e-4)
            last = unpack(await session.step(rows, position=0, want=Want.LOGITS_LAST))
            torch.testing.assert_close(last, every[:, -1:], rtol=1e-4, atol=1e-4)

    run(tiny, body)


def test_a_flood_of_steps_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torrentlm.holder.service.MAX_QUEUED_BYTES", 20)

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            with pytest.raises(RefusedError, match="too much input waits") as refused:
                await session.step([PROMPT])
            assert refused.value.code == "busy"

    run(tiny, body)


@pytest.mark.parametrize(("dtype", "size", "shape"), [("I32", 4, (1, 129)), ("F32", 4, (1, 9)), ("I32", 4, (2, 9))])
def test_a_history_that_does_not_fit_is_refused(tiny: Tiny, dtype: str, size: int, shape: tuple[int, int]) -> None:
    history = Tensor(dtype, shape, bytes(size * shape[0] * shape[1]))

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            order = Generate(session.handles.ids[-1], 1, 5, 5, history=history)
            await chain.carry(CLIENT, chain.hops[-1].node, order)
            with pytest.raises(RefusedError, match="does not fit this session"):
                await session.step([PROMPT])

    run(tiny, body)


def test_a_left_padded_batch_and_reordered_rows(tiny: Tiny) -> None:
    long, short = [5, 17, 3, 80, 41], [60, 61, 62]
    rows = [long, [0, 0, *short]]

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id, batch=2, pads=(0, 2)) as session:
            logits = unpack(await session.step(rows, want=Want.LOGITS_LAST))
            for row, prompt in enumerate((long, short)):
                torch.testing.assert_close(logits[row, -1], tiny.logits([prompt])[0, -1], rtol=1e-4, atol=1e-4)
            swapped = unpack(await session.step([[9], [9]], reorder=(1, 0)))
            for row, prompt in enumerate((short, long)):
                torch.testing.assert_close(swapped[row, -1], tiny.logits([[*prompt, 9]])[0, -1], rtol=1e-4, atol=1e-4)
        async with session_on(chain, tiny.id, batch=2, pads=(0, 2)) as session:
            steps = session.generate(rows, max_new_tokens=12, sampling=Sampling(), stop=Stop())
            tokens = [token.tokens async for token in steps]
        assert [one for one, _ in tokens] == tiny.greedy(long, 12)
        assert [other for _, other in tokens] == tiny.greedy(short, 12)

    run(tiny, body)


def test_what_does_not_fit_is_refused_with_the_reason(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        with pytest.raises(RefusedError, match="257 tokens was asked for, but this model ends at 256") as refused:
            async with session_on(chain, tiny.id, max_length=257):
                pass
        assert refused.value.code == "max_length"
        async with session_on(chain, tiny.id, max_length=8) as session:
            with pytest.raises(RefusedError, match="would reach 9 tokens") as refused:
                await session.step([[1] * 9])
            assert refused.value.code == "max_length"
        with pytest.raises(RefusedError) as refused:
            async with session_on(chain, b"?" * 32):
                pass
        assert refused.value.code == "wrong_model"

    run(tiny, body)


def test_a_full_kv_budget_is_refused_and_close_makes_room(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id):
            with pytest.raises(RefusedError, match="does not fit") as refused:
                async with session_on(chain, tiny.id):
                    pass
            assert refused.value.code == "memory"
        async with session_on(chain, tiny.id) as session:
            assert len(await generate(session, PROMPT, 4)) == 4

    # A session of 128 tokens takes 34 KiB on every holder: two layers each, a mask and positions.
    run(tiny, body, kv_budget=40 << 10)


def test_a_vanished_clients_lease_runs_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torrentlm.client.handles.LEASE_S", 0.4)
    monkeypatch.setattr("torrentlm.holder.service.REAP_EVERY_S", 0.05)

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            await trio.sleep(1.0)
            assert all(holder.sessions == 1 and holder.kv_bytes > 0 for holder in chain.holders.values())
            session.handles._scope.cancel()  # the client renews no more, as if it had vanished
            with trio.fail_after(5):
                while any(holder.sessions for holder in chain.holders.values()):
                    await trio.sleep(0.02)
            assert all(holder.kv_bytes == 0 for holder in chain.holders.values())

    run(tiny, body)


def test_a_dead_holder_is_a_clear_error(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            steps = session.generate([PROMPT], max_new_tokens=100, sampling=Sampling(), stop=Stop())
            await anext(steps)
            chain.kill(chain.hops[1].node)
            with pytest.raises(HolderLostError, match="holder"):
                async for _ in steps:
                    pass

    run(tiny, body)


def test_steps_of_old_epochs_strangers_and_repeats_do_nothing(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            first = unpack(await session.step([PROMPT]))
            await session.step([[9]], position=2)
            stem, handle = chain.hops[0].node, session.handles.ids[0]
            before = len(chain.sent)
            for epoch, position in ((1, 5), (2, 2)):  # an old epoch; a step that is done already
                step = Step(handle, epoch, position, position, Want.LOGITS_ALL, None, (ids_tensor([[7]]),), 1)
                await chain.holders[stem].handle(chain.hops[-1].node, step)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(chain.sent) == before
            step = Step(handle, 9, 0, 0, Want.LOGITS_ALL, None, (ids_tensor([[7]]),), 1)
            await chain.holders[stem].handle(chain.hops[1].node, step)  # not this hop's predecessor
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not any(isinstance(message, Step) for _, message in chain.sent[before:])
        async with session_on(chain, tiny.id) as session:
            assert torch.equal(unpack(await session.step([PROMPT])), first)

    run(tiny, body)


@pytest.mark.parametrize(
    "odd",
    [
        {"tensors": ()},
        {"tensors": (Tensor("I32", (5,), bytes(20)),)},
        {"tensors": (Tensor("F32", (1, 5), bytes(20)),)},
        {"tensors": (Tensor("I32", (1, 1), b"\xff\xff\xff\x7f"),)},
        {"reorder": (255,) * 256},
        {"position": 77},
    ],
    ids=str,
)
def test_odd_steps_hurt_their_own_session_only(tiny: Tiny, odd: dict[str, Any]) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as healthy, session_on(chain, tiny.id) as hurt:
            step = Step(hurt.handles.ids[0], 1, 0, 0, Want.LOGITS_ALL, None, (ids_tensor([[7]]),), 1)
            await chain.holders[chain.hops[0].node].handle(CLIENT, replace(step, **odd))
            with trio.fail_after(5):
                while not any(isinstance(message, Fail) for _, message in chain.sent):
                    await trio.sleep(0.01)
            assert ids_of(await generate(healthy, PROMPT, 6)) == tiny.greedy(PROMPT, 6)

    run(tiny, body)


def test_a_failing_forward_is_a_failure_of_its_session(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Execution.run

    def fails(self: Execution, step: Step) -> Result:
        if step.position == 0:
            raise RefusedError("x" * 5000, "no such code")
        return whole(self, step)

    monkeypatch.setattr(Execution, "run", fails)

    async def body(chain: Chain) -> None:
        with pytest.raises(RefusedError, match="xxx") as refused:
            async with session_on(chain, tiny.id) as session:
                await generate(session, PROMPT, 4)
        assert refused.value.code == "internal"

    run(tiny, body)


def test_a_step_broken_off_does_not_answer_the_next(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Execution.run

    def slowly(self: Execution, step: Step) -> Result:
        time.sleep(0.1)
        return whole(self, step)

    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            await session.step([PROMPT])
            monkeypatch.setattr(Execution, "run", slowly)
            with trio.move_on_after(0.05):
                await session.step([[4]])
            found = unpack(await session.step([[9]]))
        expected = tiny.logits([[*PROMPT, 9]])[:, -1:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    run(tiny, body)


def test_close_overtakes_an_open_that_is_being_built(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            opening = Opening(tiny.id, 1, session.max_length, (0,))
            opened = replace(session.handles.open_message(0, opening), session=SessionId(b"o" * 16))
        holder = chain.holders[chain.hops[0].node]
        await holder.handle(CLIENT, opened)
        await holder.handle(CLIENT, Close(opened.session))
        await trio.testing.wait_all_tasks_blocked(0.3)
        assert holder.sessions == 0 and holder.kv_bytes == 0

    run(tiny, body)


def test_positions_past_the_end_are_our_own_mistake(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        async with session_on(chain, tiny.id) as session:
            with pytest.raises(LocalProtocolError):
                await session.step([[1]], position=3)

    run(tiny, body)


def test_an_unknown_session_is_refused_not_ignored(tiny: Tiny) -> None:
    async def body(chain: Chain) -> None:
        step = Step(SessionId(bytes(16)), 0, 0, 0, Want.SAMPLE, None, (ids_tensor([[7]]),), 1)
        await chain.holders[chain.hops[0].node].handle(CLIENT, step)
        assert chain.sent[-1][1].code == "unknown_session"  # type: ignore[union-attr]

    run(tiny, body)
