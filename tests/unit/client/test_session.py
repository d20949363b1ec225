"""A client does not believe its holders: whatever they send, a session ends in bounds and with one of our errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio

from torrentlm.client.session import RemoteSession, open_session
from torrentlm.errors import RemoteProtocolError
from torrentlm.records import Endpoint, NodeKey, Sampling, SessionId, Span, Stop
from torrentlm.route.plan import Hop
from torrentlm.structured import single_error
from torrentlm.wire.messages import Message, NextHop, Open, Opened, Output, Step, Token
from torrentlm.wire.tensors import Tensor

VOCABULARY = 97
PROMPT = [1, 2, 3]

Answer = Callable[[SessionId, Step], Sequence[Message]]


class OneHolder:
    """Links to a holder that opens any session and answers each step with what the test says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._inbox: dict[SessionId, trio.MemorySendChannel[Message]] = {}

    async def connect(self, hop: NextHop) -> None:
        await trio.lowlevel.checkpoint()

    async def send(self, node: NodeKey, message: Message, session: SessionId) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(message, Open):
            await self._inbox[session].send(Opened(session, 0, 1, 10_000))
        elif isinstance(message, Step):
            for answer in self._answer(session, message):
                await self._inbox[session].send(answer)

    def listen(self, session: SessionId, holder: NodeKey, inbox: trio.MemorySendChannel[Message]) -> None:
        self._inbox[session] = inbox

    def stop_listening(self, session: SessionId, holder: NodeKey) -> None:
        self._inbox.pop(session, None)

    async def wait_lost(self, node: NodeKey) -> None:
        await trio.sleep_forever()


def with_session(answer: Answer, use: Callable[[RemoteSession], object]) -> None:
    async def main() -> None:
        with single_error(), trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                hops = [Hop(NodeKey(b"k" * 32), Endpoint("127.0.0.1", 1), Span(0, 3))]
                session = await open_session(
                    OneHolder(answer), nursery, b"m" * 32, hops, ["h"], max_length=64, vocabulary=VOCABULARY
                )
                await use(session)  # type: ignore[misc]
                await session.close()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def take(session: RemoteSession) -> list[int]:
    steps = session.generate([PROMPT], max_new_tokens=4, sampling=Sampling(), stop=Stop())
    return [token.tokens[0] async for token in steps]


def token(session: SessionId, step: Step, index: int, finish: str | None = None, **changed: int) -> Token:
    values = {"position": len(PROMPT) + index, "index": index} | changed
    return Token(session, step.epoch, tokens=(5,), finish=finish, **values)


def test_tokens_in_order_are_taken() -> None:
    async def use(session: RemoteSession) -> None:
        assert await take(session) == [5, 5, 5]
        assert session.length == len(PROMPT) + 2

    with_session(lambda s, step: [token(s, step, n, "stop_token" if n == 2 else None) for n in range(3)], use)


@pytest.mark.parametrize(
    "answer",
    [
        lambda s, step: [token(s, step, n) for n in range(1000)],
        lambda s, step: [token(s, step, 0), token(s, step, 0)],
        lambda s, step: [token(s, step, 1)],
        lambda s, step: [token(s, step, 0, position=50)],
        lambda s, step: [Token(s, step.epoch, len(PROMPT), 0, (5, 5), None)],
        lambda s, step: [Token(s, step.epoch, len(PROMPT), 0, (), "length")],
    ],
    ids=["endless", "twice", "skipped", "elsewhere", "rows too many", "no row"],
)
def test_tokens_that_are_not_due_end_it(answer: Answer) -> None:
    async def use(session: RemoteSession) -> None:
        with pytest.raises(RemoteProtocolError, match="h sent a token that was not due"):
            await take(session)

    with_session(answer, use)


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (Tensor("F32", (), b"\0" * 4),),
        (Tensor("F32", (0, 3, 97), b""),),
        (Tensor("F32", (1, 1, 97), bytes(4 * 97)),),
        (Tensor("I32", (1, 3, 97), bytes(4 * 3 * 97)),),
        (Tensor("F32", (1, 3, 1), bytes(12)), Tensor("F32", (1, 3, 1), bytes(12))),
    ],
)
def test_outputs_that_are_no_logits_end_it(tensors: tuple[Tensor, ...]) -> None:
    async def use(session: RemoteSession) -> None:
        with pytest.raises(RemoteProtocolError, match="h sent something else than logits"):
            await session.step([PROMPT])

    with_session(lambda s, step: [Output(s, step.epoch, step.position, tensors)], use)
