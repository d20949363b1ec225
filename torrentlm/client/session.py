"""One session on a route, as its client: what to run at which position, in epochs, and what comes back.

The client is not in the token loop: it opens the session, sends the prompt to the stem's holder and what to sample to
the head's holder, and then only listens. A second way, stepping, gives full control: tokens in, logits out, roll
back, reorder rows.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import trio

from torrentlm.client.handles import ChosenAdapter, Handles, Links, Opening
from torrentlm.errors import HolderLostError, LocalProtocolError, RefusedError, RemoteProtocolError, TorrentLMError
from torrentlm.records import NodeKey, Sampling, Stop
from torrentlm.route.plan import Hop
from torrentlm.wire.ids import ids_tensor
from torrentlm.wire.messages import Generate, Halt, Output, Step, Token, Want
from torrentlm.wire.tensors import Tensor, join_tokens

SILENCE_LIMIT_S = 60.0
"""Longest wait for the next token or output; a dead pipe is noticed much sooner."""
PREFILL_CHUNK = 512
"""Tokens per step of a long prompt: the holders work on different chunks of it at the same time."""
IN_FLIGHT = 4
"""Chunks of a prompt under way at once, so that every holder has one to run and none has to keep a whole prompt."""
OUTPUT_BYTES = 32 << 20
"""Most bytes of logits asked for at once."""
LOGIT_BYTES = 4
FLOATS = ("F16", "BF16", "F32", "F64")


class RemoteSession:
    """Made by :func:`open_session`. ``length`` is the number of tokens per row that every holder surely has cached."""

    def __init__(self, handles: Handles, opening: Opening, vocabulary: int, whole: bool, single: bool) -> None:
        self.batch = opening.batch
        self.max_length = opening.max_length
        self.length = 0
        self.handles = handles
        self._vocabulary = vocabulary
        self._chunk = self.max_length if whole else PREFILL_CHUNK
        self._single = single
        self._epoch = 0
        self._running = False
        self._stepping = False

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The route."""
        return self.handles.hops

    @property
    def lost(self) -> bool:
        """A holder went away or refused: nothing more will come of this session."""
        return self.handles.lost

    def _new_epoch(self, position: int) -> None:
        if position > self.length:
            raise LocalProtocolError(f"position {position} is past the {self.length} tokens of this session")
        self._epoch += 1

    async def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        position: int | None = None,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stop,
        history: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Feed ``rows`` (B × n token ids) at ``position`` (default: the end) and yield tokens until the head stops.

        ``history`` are all ids before the first new token, per row; they go to the head's holder only, and only if
        the sampling needs them. Leaving the iterator early cancels on every holder. Raises RefusedError,
        HolderLostError.
        """
        start = self.length if position is None else position
        self._new_epoch(start)
        epoch = self._epoch
        count = len(rows[0])
        end = start + count
        if end + 1 > self.max_length:
            raise RefusedError(
                f"the text has {end} tokens and leaves no room in a session of {self.max_length}: shorten it",
                "max_length",
            )
        past = None
        if sampling.repetition_penalty != 1.0 and history is not None:
            past = ids_tensor(history)
        self.length = start
        self._running = True
        try:
            last, head = len(self.hops) - 1, self.handles.ids[-1]
            await self.handles.send(last, Generate(head, epoch, end - 1, max_new_tokens, sampling, stop, past))
            rest = await self._prefill(rows, start)
            chunk = ids_tensor([row[rest:] for row in rows])
            await self.handles.send(0, self._step(start + rest, Want.SAMPLE, chunk, emit_from=end - 1))
            for index in itertools.count():
                token = await self._await_token(epoch)
                # What a holder says is not believed: it could stream for ever, or move the session's end.
                due = (index, end + index, self.batch)
                if (token.index, token.position, len(token.tokens)) != due or index >= max_new_tokens:
                    raise RemoteProtocolError(f"{self.handles.labels[-1]} sent a token that was not due")
                self.length = token.position
                if token.finish is not None:
                    self._running = False
                yield token
                if token.finish is not None:
                    return
        finally:
            if self._running:
                self._running = False
                await self.handles.tell_all(lambda handle: Halt(handle, epoch))

    async def _await_token(self, epoch: int) -> Token:
        with trio.move_on_after(SILENCE_LIMIT_S):
            while True:
                message = await self.handles.next(self._epoch)
                if isinstance(message, Token) and message.epoch == epoch:
                    return message
        raise HolderLostError(f"no token came for {SILENCE_LIMIT_S:.0f} s: ask again")

    def _step(
        self,
        position: int,
        want: Want,
        tensor: Tensor,
        *,
        emit_from: int | None = None,
        reorder: tuple[int, ...] | None = None,
    ) -> Step:
        return Step(
            session=self.handles.ids[0],
            epoch=self._epoch,
            position=position,
            emit_from=position if emit_from is None else emit_from,
            want=want,
            reorder=reorder,
            tensors=(tensor,),
            tokens=tensor.shape[1],
        )

    def _chunk_at(self, position: int) -> int:
        """Tokens per row that a step at this position may bring."""
        return 1 if self._single and position else self._chunk

    async def _prefill(self, rows: Sequence[Sequence[int]], start: int, reorder: tuple[int, ...] | None = None) -> int:
        """Feed all but the last chunk of ``rows``, a few at a time; returns where that one begins."""
        size = self._chunk_at(start)
        last = max(len(rows[0]) - 1, 0) // size * size
        in_flight: deque[int] = deque()
        for offset in range(0, last, size):
            if len(in_flight) == max(IN_FLIGHT, len(self.hops) + 1):
                await self._await_output(in_flight.popleft())
            chunk = ids_tensor([row[offset : offset + size] for row in rows])
            await self.handles.send(
                0, self._step(start + offset, Want.NONE, chunk, reorder=None if offset else reorder)
            )
            in_flight.append(start + offset)
        return last

    async def _await_output(self, position: int) -> tuple[Tensor, ...]:
        """What the step at ``position`` gave; nothing where it wanted nothing."""
        with trio.move_on_after(SILENCE_LIMIT_S):
            while True:
                message = await self.handles.next(self._epoch)
                if isinstance(message, Output) and (message.epoch, message.position) == (self._epoch, position):
                    return message.tensors
        raise HolderLostError(f"no output came for {SILENCE_LIMIT_S:.0f} s: ask again")

    async def step(
        self,
        rows: Sequence[Sequence[int]],
        *,
        position: int | None = None,
        want: Want = Want.LOGITS_ALL,
        reorder: Sequence[int] | None = None,
    ) -> Tensor:
        """Stepping mode: feed B × n ids (n may be 0) and return the logits, [B, n, vocabulary] or [B, 1, vocabulary].

        A ``position`` below :attr:`length` rolls the session back to it first; ``reorder`` picks cache rows before
        the step.
        """
        start = self.length if position is None else position
        # A step that was broken off may still be under way: its output must not be taken for this one's.
        if start != self.length or self._epoch == 0 or self._stepping:
            self._new_epoch(start)
        self._stepping = True
        picked = tuple(reorder) if reorder is not None else None
        count = len(rows[0])
        first, size = 0, self._chunk_at(start)
        if want == Want.LOGITS_ALL and size == PREFILL_CHUNK:
            size = min(size, max(1, OUTPUT_BYTES // (LOGIT_BYTES * self._vocabulary * self.batch)))
        elif want != Want.LOGITS_ALL:
            first = await self._prefill(rows, start, picked)
        logits: list[Tensor] = []
        for offset in range(first, max(count, first + 1), size):
            chunk = ids_tensor([row[offset : offset + size] for row in rows])
            await self.handles.send(0, self._step(start + offset, want, chunk, reorder=None if offset else picked))
            tensors = await self._await_output(start + offset)
            wide = min(size, count - offset) if want == Want.LOGITS_ALL else min(1, count)
            if [(tensor.dtype in FLOATS, tensor.shape[:-1]) for tensor in tensors] != [(True, (self.batch, wide))]:
                raise RemoteProtocolError(f"{self.handles.labels[-1]} sent something else than logits")
            logits += tensors
        self.length = start + count
        self._stepping = False
        return join_tokens(logits)

    async def close(self) -> None:
        """Free what the holders keep; twice is once. A holder that cannot be told frees it when the lease ends."""
        await self.handles.close()


async def open_session(
    links: Links,
    nursery: trio.Nursery,
    model: bytes,
    hops: Sequence[Hop],
    labels: Sequence[str],
    *,
    batch: int = 1,
    max_length: int,
    vocabulary: int,
    whole: bool = False,
    single: bool = False,
    pads: tuple[int, ...] | None = None,
    encoded: tuple[Tensor, ...] = (),
    adapter: ChosenAdapter | None = None,
    blame: Callable[[NodeKey], None] = lambda node: None,
) -> RemoteSession:
    """Open a session on every holder of ``hops``; the caller closes it. ``nursery`` runs its watchers until then.

    ``labels`` name the holders in messages to a person; ``vocabulary`` is the width of logits; ``whole``: a prompt may
    not come in parts; ``single``: behind it the model takes one token at a time; ``encoded``: what an encoder made, for
    a decoder; ``blame`` hears which holder it was that an opening failed at.
    Raises RefusedError, HolderLostError, NetworkError.
    """
    handles = Handles(links, hops, labels)
    opening = Opening(model, batch, max_length, pads or (0,) * batch, encoded, adapter)
    try:
        await handles.open(opening)
    except BaseException as error:
        await handles.close()
        if isinstance(error, TorrentLMError) and handles.culprit is not None:
            blame(handles.culprit)
        raise
    nursery.start_soon(handles.keep)
    return RemoteSession(handles, opening, vocabulary, whole, single)
