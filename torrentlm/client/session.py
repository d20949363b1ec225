"""One session on a route, as its client: handles on every holder, leases, epochs, tokens coming back.

The client is not in the token loop: it opens the session, sends the prompt to the stem's holder and what to sample to
the head's holder, and then only listens. A second way, stepping, gives full control: tokens in, logits out, roll
back, reorder rows.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from torrentlm.errors import (
    HolderLostError,
    LocalProtocolError,
    NetworkError,
    RefusedError,
    RemoteProtocolError,
    TorrentLMError,
)
from torrentlm.records import AdapterId, NodeKey, Sampling, SessionId, Span, Stop
from torrentlm.route.plan import Hop
from torrentlm.wire.ids import ids_tensor
from torrentlm.wire.messages import (
    Close,
    Encoded,
    Fail,
    Generate,
    Halt,
    Message,
    NextHop,
    Open,
    Opened,
    Output,
    Renew,
    Step,
    Token,
    Want,
)
from torrentlm.wire.tensors import Tensor, join_tokens

OPEN_TIMEOUT_S = 20.0
ADAPTER_TIMEOUT_S = 40.0
"""More, where holders may have to fetch an adapter first; they give up sooner themselves."""
SILENCE_LIMIT_S = 60.0
"""Longest wait for the next token or output; a dead pipe is noticed much sooner."""
LEASE_S = 30.0
PREFILL_CHUNK = 512
"""Tokens per step of a long prompt: the holders work on different chunks of it at the same time."""
IN_FLIGHT = 4
"""Chunks of a prompt under way at once, so that every holder has one to run and none has to keep a whole prompt."""
OUTPUT_BYTES = 32 << 20
"""Most bytes of logits asked for at once."""
LOGIT_BYTES = 4
FLOATS = ("F16", "BF16", "F32", "F64")
CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class ChosenAdapter:
    """What a session runs with besides the model. ``touched`` are the blocks that it changes."""

    id: AdapterId
    touched: frozenset[int]

    def needed_by(self, span: Span) -> AdapterId | None:
        """Its id for a holder of ``span``; None if nothing of it is for these blocks."""
        return self.id if any(block in self.touched for block in span) else None


class Links(Protocol):
    """How a client reaches holders; the node is one."""

    async def connect(self, hop: NextHop) -> None:
        """Make sure that there is a pipe. Raises NetworkError."""

    async def send(self, node: NodeKey, message: Message, session: SessionId) -> None:
        """Send on the session's stream. Raises NetworkError when the node cannot be reached."""

    def listen(self, session: SessionId, holder: NodeKey, inbox: trio.MemorySendChannel[Message]) -> None:
        """Deliver what ``holder``, and nobody else, sends to this handle into ``inbox``."""

    def stop_listening(self, session: SessionId, holder: NodeKey) -> None:
        """Undo :meth:`listen`."""

    async def wait_lost(self, node: NodeKey) -> None:
        """Return when there is no pipe to ``node`` any more."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """A holder's pipe is dead: put into the inbox by its watcher."""

    hop: int


class RemoteSession:
    """Made by :func:`open_session`. ``length`` is the number of tokens per row that every holder surely has cached."""

    def __init__(
        self,
        links: Links,
        hops: Sequence[Hop],
        labels: Sequence[str],
        batch: int,
        max_length: int,
        vocabulary: int,
        whole: bool,
        single: bool,
        adapter: ChosenAdapter | None = None,
    ) -> None:
        self.hops = tuple(hops)
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self._vocabulary = vocabulary
        self._chunk = max_length if whole else PREFILL_CHUNK
        self._adapter = adapter
        self._single = single
        self._links = links
        self._labels = tuple(labels)
        self._handles = tuple(SessionId(secrets.token_bytes(16)) for _ in hops)
        self._epoch = 0
        self._running = False
        self._send_inbox, self._inbox = trio.open_memory_channel[Message | _Lost](1024)
        self._scope = trio.CancelScope()
        self._closed = False
        self._lease_s = LEASE_S
        self._stepping = False
        self.culprit: NodeKey | None = None
        """The holder that the last failure is about."""
        self.lost = False
        """A holder went away or refused: nothing more will come of this session."""
        for hop, handle in zip(self.hops, self._handles, strict=True):
            links.listen(handle, hop.node, self._send_inbox)

    @property
    def _stem(self) -> tuple[NodeKey, SessionId]:
        return self.hops[0].node, self._handles[0]

    @property
    def _head(self) -> tuple[NodeKey, SessionId]:
        return self.hops[-1].node, self._handles[-1]

    def _open_message(self, index: int, model: bytes, pads: tuple[int, ...], source: int) -> Open:
        following = (index + 1) % len(self.hops)
        hop, after = self.hops[index], self.hops[following]
        return Open(
            session=self._handles[index],
            epoch=0,
            model=model,
            first=hop.span.first,
            last=hop.span.last,
            prev=(self.hops[index - 1].node,),
            next=NextHop(after.node, after.endpoint.host, after.endpoint.port, self._handles[following]),
            batch=self.batch,
            max_length=self.max_length,
            lease_ms=int(LEASE_S * 1000),
            pads=pads,
            source=source,
            adapter=None if self._adapter is None else self._adapter.needed_by(hop.span),
        )

    async def _open(self, model: bytes, pads: tuple[int, ...], encoded: tuple[Tensor, ...]) -> None:
        waiting = dict.fromkeys(self._handles)
        limit = OPEN_TIMEOUT_S + (ADAPTER_TIMEOUT_S if self._adapter is not None else 0)
        with trio.move_on_after(limit):
            for index, hop in enumerate(self.hops):
                self.culprit = hop.node
                await self._links.connect(NextHop(hop.node, hop.endpoint.host, hop.endpoint.port, self._handles[index]))
                source = encoded[1].shape[1] if encoded else 0
                await self._send(index, self._open_message(index, model, pads, source))
            while waiting:
                self.culprit = self.hops[self._handles.index(next(iter(waiting)))].node
                message = await self._next()
                if isinstance(message, Opened):
                    waiting.pop(message.session, None)
                    self._lease_s = min(self._lease_s, message.lease_ms / 1000)
            for index, handle in enumerate(self._handles if encoded else ()):
                self.culprit = self.hops[index].node
                await self._send(index, Encoded(handle, encoded))
            self.culprit = None
            return
        label = next(label for hop, label in zip(self.hops, self._labels, strict=True) if hop.node == self.culprit)
        raise HolderLostError(f"{label} did not open a session within {limit:.0f} s: try again")

    async def _next(self) -> Message:
        """The next message of any holder of this session; failures become exceptions."""
        message = await self._inbox.receive()
        if isinstance(message, _Lost):
            self.lost, self.culprit = True, self.hops[message.hop].node
            raise HolderLostError(f"{self._labels[message.hop]} went away in the middle of the session: ask again")
        if isinstance(message, Fail) and message.epoch >= self._epoch:
            hop = self._handles.index(message.session)
            label = self._labels[hop]
            self.lost, self.culprit = True, self.hops[hop].node
            if message.code == "lost_next":
                raise HolderLostError(f"{label} lost the next holder on the route ({message.message}): ask again")
            raise RefusedError(f"{label}: {message.message}", message.code)
        return message

    async def _send(self, hop: int, message: Message) -> None:
        try:
            await self._links.send(self.hops[hop].node, message, self._handles[hop])
        except NetworkError as error:
            self.lost, self.culprit = True, self.hops[hop].node
            raise HolderLostError(f"{self._labels[hop]} cannot be reached any more ({error}): ask again") from error

    async def _keep(self) -> None:
        """While the session is open: renew its leases, notice lost holders."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for index in range(len(self.hops)):
                    nursery.start_soon(self._watch, index)
                while True:
                    await trio.sleep(self._lease_s / 3)
                    for hop, handle in enumerate(self._handles):
                        try:
                            await self._links.send(self.hops[hop].node, Renew((handle,)), handle)
                        except NetworkError:
                            await self._send_inbox.send(_Lost(hop))

    async def _watch(self, index: int) -> None:
        await self._links.wait_lost(self.hops[index].node)
        await self._send_inbox.send(_Lost(index))

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
            last = len(self.hops) - 1
            await self._send(last, Generate(self._handles[last], epoch, end - 1, max_new_tokens, sampling, stop, past))
            rest = await self._prefill(rows, start)
            chunk = ids_tensor([row[rest:] for row in rows])
            await self._send(0, self._step(start + rest, Want.SAMPLE, chunk, emit_from=end - 1))
            for index in itertools.count():
                token = await self._await_token(epoch)
                # What a holder says is not believed: it could stream for ever, or move the session's end.
                due = (index, end + index, self.batch)
                if (token.index, token.position, len(token.tokens)) != due or index >= max_new_tokens:
                    raise RemoteProtocolError(f"{self._labels[-1]} sent a token that was not due")
                self.length = token.position
                if token.finish is not None:
                    self._running = False
                yield token
                if token.finish is not None:
                    return
        finally:
            if self._running:
                self._running = False
                with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                    await self._cancel(epoch)

    async def _await_token(self, epoch: int) -> Token:
        with trio.move_on_after(SILENCE_LIMIT_S):
            while True:
                message = await self._next()
                if isinstance(message, Token) and message.epoch == epoch:
                    return message
        raise HolderLostError(f"no token came for {SILENCE_LIMIT_S:.0f} s: ask again")

    async def _cancel(self, epoch: int) -> None:
        for hop, handle in enumerate(self._handles):
            try:
                await self._links.send(self.hops[hop].node, Halt(handle, epoch), handle)
            except NetworkError:
                continue  # a holder that is gone has nothing left to stop

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
            session=self._handles[0],
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
            await self._send(0, self._step(start + offset, Want.NONE, chunk, reorder=None if offset else reorder))
            in_flight.append(start + offset)
        return last

    async def _await_output(self, position: int) -> tuple[Tensor, ...]:
        """What the step at ``position`` gave; nothing where it wanted nothing."""
        with trio.move_on_after(SILENCE_LIMIT_S):
            while True:
                message = await self._next()
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
            await self._send(0, self._step(start + offset, want, chunk, reorder=None if offset else picked))
            tensors = await self._await_output(start + offset)
            wide = min(size, count - offset) if want == Want.LOGITS_ALL else min(1, count)
            if [(tensor.dtype in FLOATS, tensor.shape[:-1]) for tensor in tensors] != [(True, (self.batch, wide))]:
                raise RemoteProtocolError(f"{self._labels[-1]} sent something else than logits")
            logits += tensors
        self.length = start + count
        self._stepping = False
        return join_tokens(logits)

    async def close(self) -> None:
        """Free what the holders keep; twice is once. A holder that cannot be told frees it when the lease ends."""
        if self._closed:
            return
        self._closed = True
        self._scope.cancel()
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            for index, handle in enumerate(self._handles):
                try:
                    await self._links.send(self.hops[index].node, Close(handle), handle)
                except NetworkError:
                    continue
        for hop, handle in zip(self.hops, self._handles, strict=True):
            self._links.stop_listening(handle, hop.node)


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
    session = RemoteSession(links, hops, labels, batch, max_length, vocabulary, whole, single, adapter)
    try:
        await session._open(model, pads or (0,) * batch, encoded)
    except BaseException as error:
        await session.close()
        if isinstance(error, TorrentLMError) and session.culprit is not None:
            blame(session.culprit)
        raise
    nursery.start_soon(session._keep)
    return session
