"""From a prompt to text: tokenize, run a session, decode what comes back, count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from torrentlm.client.session import RemoteSession
from torrentlm.compute.stopping import TextStream
from torrentlm.records import Sampling, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RouteHop:
    """One hop as a person or a script sees it: the holder's address and the blocks that it runs."""

    peer: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What a generation gave. Times in seconds; ``tokens`` are the new ids; ``finish`` says why it ended."""

    text: str
    tokens: tuple[int, ...]
    tokens_per_second: float
    time_to_first_token_s: float
    route: tuple[RouteHop, ...]
    finish: str


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may ask of a generation."""

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: Stop = field(default_factory=Stop)


def route_of(session: RemoteSession) -> tuple[RouteHop, ...]:
    return tuple(RouteHop(str(hop.endpoint), hop.span.first, hop.span.last) for hop in session.hops)


async def generate(
    session: RemoteSession,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: Options,
    *,
    position: int | None = None,
    history: Sequence[int] | None = None,
    started: float | None = None,
    emit: Callable[[str], None] = lambda text: None,
) -> GenerationResult:
    """Feed ``ids`` at ``position`` and generate; ``emit`` hears each piece of text as soon as it is sure.

    ``history`` are all ids before the first new one (default ``ids``), for the repetition penalty. ``started`` is
    when the user asked, on trio's clock. If this is cancelled the holders are told. Raises RefusedError,
    HolderLostError.
    """
    started = trio.current_time() if started is None else started
    stream = TextStream(tokenizer, options.stop.strings)
    tokens: list[int] = []
    pieces: list[str] = []
    first = last = started
    finish = "length"
    steps = session.generate(
        [ids],
        position=position,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop=options.stop,
        history=[ids if history is None else history],
    )

    def say(text: str) -> None:
        if text:
            pieces.append(text)
            emit(text)

    async with aclosing(steps):
        async for token in steps:
            last = trio.current_time()
            if not tokens:
                first = last
            tokens.append(token.tokens[0])
            if token.finish != "stop_token":
                say(stream.push(token.tokens[0]))
            if token.finish is not None:
                finish = token.finish
    say(stream.finish())
    decode_s = last - first
    return GenerationResult(
        text="".join(pieces),
        tokens=tuple(tokens),
        tokens_per_second=(len(tokens) - 1) / decode_s if decode_s > 0 else 0.0,
        time_to_first_token_s=first - started,
        route=route_of(session),
        finish=finish,
    )
