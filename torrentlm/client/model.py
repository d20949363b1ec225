"""A model in the swarm as a client uses it: routes, sessions, generations, chats. No weights, no blocks."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from torrentlm.client.chat import ChatContext, chat_ids
from torrentlm.client.encoding import encode
from torrentlm.client.generation import GenerationResult, Options, RouteHop, generate
from torrentlm.client.handles import ChosenAdapter, Links
from torrentlm.client.route_finder import ROUTE_TIMEOUT_S, Directory, find_route
from torrentlm.client.session import RemoteSession, open_session
from torrentlm.errors import ArtifactError, HolderLostError, LocalProtocolError, NetworkError, RefusedError
from torrentlm.manifest.manifest import Manifest
from torrentlm.records import Stop
from torrentlm.route.plan import Hop
from torrentlm.wire.messages import Want
from torrentlm.wire.tensors import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_ATTEMPTS = 3
ELSEWHERE = ("busy", "memory", "no_adapter", "no_block")
"""Refusals of one holder that another may not share: the next route avoids it."""
CHAT_LENGTH = 4096
"""Tokens of a chat's session, if the model allows as many."""


class ModelClient:
    """``max_length`` is the model's own limit in tokens (None: it has none), ``vocabulary`` the width of its logits;
    ``stop_tokens`` end every generation. ``adapters`` finds the adapter that a magnet link names."""

    def __init__(
        self,
        links: Links,
        directory: Directory,
        model: bytes,
        tokenizer: PreTrainedTokenizerBase | None,
        nursery: trio.Nursery,
        *,
        max_length: int | None,
        vocabulary: int,
        stop_tokens: Sequence[int],
        adapters: Callable[[str], Awaitable[ChosenAdapter]],
        decoder_start: int | None = None,
        waiting: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._links = links
        self._directory = directory
        self._model = model
        self._tokenizer = tokenizer
        self._nursery = nursery
        self.max_length = max_length
        self._decoder_start = decoder_start
        self.vocabulary = vocabulary
        self._stop_tokens = tuple(stop_tokens)
        self._adapters = adapters
        self._waiting = waiting

    async def route(self, timeout: float = ROUTE_TIMEOUT_S) -> tuple[RouteHop, ...]:
        """The route that a session opened now would take, of an encoder-decoder through both. Raises NoHolderError."""
        found: list[RouteHop] = []
        for side in range(len(self.manifest.sides)):
            hops = await find_route(self._directory, side, timeout=timeout, waiting=self._waiting)
            found += (RouteHop(str(hop.endpoint), hop.span.first, hop.span.last) for hop in hops)
        return tuple(found)

    @property
    def manifest(self) -> Manifest:
        return self._directory.manifest

    async def open(
        self,
        *,
        batch: int = 1,
        max_length: int,
        pads: tuple[int, ...] | None = None,
        side: int = -1,
        encoded: tuple[Tensor, ...] = (),
        adapter: str | None = None,
    ) -> RemoteSession:
        """A session on the best route through one side of the model, by default the one that generates.

        ``adapter`` is the magnet link of an adapter to apply. Raises NoHolderError, RefusedError, HolderLostError,
        NetworkError; ArtifactError for a magnet of something else.
        """
        attempts = OPEN_ATTEMPTS
        side %= len(self.manifest.sides)
        single = not self.manifest.sides[side].chunks
        chosen = None if adapter is None else await self._adapters(adapter)
        touched = frozenset[int]() if chosen is None else chosen.touched
        while True:
            hops = await find_route(self._directory, side, adapted=touched, waiting=self._waiting)
            attempts -= 1
            try:
                return await open_session(
                    self._links,
                    self._nursery,
                    self._model,
                    hops,
                    [self._label(hop) for hop in hops],
                    batch=batch,
                    max_length=max_length,
                    vocabulary=self.vocabulary,
                    whole=single or self.manifest.blocks[-1].rewind == "replay",
                    single=single,
                    pads=pads,
                    encoded=encoded,
                    adapter=chosen,
                    blame=self._directory.blame,
                )
            except RefusedError as error:
                if error.code not in ELSEWHERE or not attempts:
                    raise
            except (HolderLostError, NetworkError):
                if not attempts:
                    raise

    @asynccontextmanager
    async def session(
        self,
        *,
        batch: int = 1,
        max_length: int,
        pads: tuple[int, ...] | None = None,
        side: int = -1,
        encoded: tuple[Tensor, ...] = (),
        adapter: str | None = None,
    ) -> AsyncIterator[RemoteSession]:
        """:meth:`open`, closed on the way out."""
        session = await self.open(
            batch=batch, max_length=max_length, pads=pads, side=side, encoded=encoded, adapter=adapter
        )
        try:
            yield session
        finally:
            await session.close()

    def _label(self, hop: Hop) -> str:
        blocks = f"block {hop.span}" if len(hop.span) == 1 else f"blocks {hop.span}"
        return f"the holder at {hop.endpoint} ({blocks})"

    async def generate(
        self,
        prompt: str,
        options: Options,
        *,
        chat: bool = False,
        adapter: str | None = None,
        emit: Callable[[str], None] = lambda text: None,
    ) -> GenerationResult:
        """Continue ``prompt`` as it is, or answer it through the chat template. Raises as :meth:`open`."""
        started = trio.current_time()
        if chat:
            ids = chat_ids(self.tokenizer, [{"role": "user", "content": prompt}])
        else:
            ids = [int(token) for token in self.tokenizer(prompt)["input_ids"]]
        if not ids:
            raise RefusedError("the prompt is empty: there is nothing to continue", "bad_request")
        self.require_writer()
        if self.manifest.task == "seq2seq":
            return await self._translate(ids, options, adapter, started, emit)
        length = len(ids) + options.max_new_tokens
        if self.max_length is not None and length > self.max_length:
            raise RefusedError(
                f"{len(ids)} prompt tokens and {options.max_new_tokens} new ones make {length}, but this model ends at "
                f"{self.max_length}: shorten the prompt or ask for fewer",
                "max_length",
            )
        async with self.session(max_length=length, adapter=adapter) as session:
            return await generate(session, self.tokenizer, ids, self.complete(options), started=started, emit=emit)

    @property
    def trims(self) -> bool:
        """Whether every block's state can be cut at any token."""
        return all(block.rewind == "trim" for block in self.manifest.blocks)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ArtifactError for a model that was published without one."""
        if self._tokenizer is None:
            raise ArtifactError("this model was published without a tokenizer: send token ids, in a model.session()")
        return self._tokenizer

    def require_writer(self) -> None:
        """Raise RefusedError for a model that only reads."""
        if self.manifest.task == "encoder":
            raise RefusedError("this model reads texts and writes none: use torrentlm embed", "bad_request")

    async def _translate(
        self, ids: list[int], options: Options, adapter: str | None, started: float, emit: Callable[[str], None]
    ) -> GenerationResult:
        """Let the encoder read ``ids``, and the decoder write."""
        if self._decoder_start is None:
            raise RefusedError("this model does not say with which token its decoder begins", "bad_request")
        if self.max_length is not None and max(len(ids), options.max_new_tokens + 1) > self.max_length:
            raise RefusedError(
                f"{len(ids)} tokens to read and {options.max_new_tokens} to write: this model takes up to "
                f"{self.max_length} of either",
                "max_length",
            )
        states, readers = await encode(self, [ids], 0, adapter)
        encoded = (states, Tensor("BOOL", (1, len(ids)), b"\1" * len(ids)))
        async with self.session(max_length=options.max_new_tokens + 1, encoded=encoded, adapter=adapter) as session:
            start = [self._decoder_start]
            complete = self.complete(options)
            written = await generate(session, self.tokenizer, start, complete, started=started, emit=emit)
            return replace(written, route=readers + written.route)

    def complete(self, options: Options) -> Options:
        """With the model's own end-of-text tokens among the stops."""
        stop = Stop(tuple(dict.fromkeys((*options.stop.tokens, *self._stop_tokens))), options.stop.strings)
        return replace(options, stop=stop)

    def chat(self, system: str | None, adapter: str | None = None) -> ChatSession:
        """Raises RefusedError for a model that does not continue a text."""
        self.require_writer()
        if self.manifest.task == "seq2seq":
            raise RefusedError("this model has no memory of a chat: use torrentlm generate", "bad_request")
        length = min(CHAT_LENGTH, self.max_length or CHAT_LENGTH)
        return ChatSession(self, ChatContext(self.tokenizer, system), length, adapter)

    def steps(self, batch: int, max_length: int, pads: tuple[int, ...], adapter: str | None = None) -> StepSession:
        return StepSession(self, batch, max_length, pads, adapter)


class ChatSession:
    """A conversation and its session on the holders, opened when first needed and again after a holder was lost."""

    def __init__(self, client: ModelClient, context: ChatContext, max_length: int, adapter: str | None) -> None:
        self.context = context
        self._client = client
        self._max_length = max_length
        self._adapter = adapter
        self._session: RemoteSession | None = None

    async def ask(self, text: str, options: Options, emit: Callable[[str], None]) -> GenerationResult:
        """One turn. Raises as ModelClient.open; a conversation past the session's length is a RefusedError."""
        if self._session is not None and self._session.lost:
            await self.close()
        if self._session is None:
            self.context.forget_cache()
            self._session = await self._client.open(max_length=self._max_length, adapter=self._adapter)
        try:
            complete = self._client.complete(options)
            trims = self._client.trims
            return await self.context.ask(self._session, text, complete, emit, trims=trims)
        except RefusedError as error:
            if error.code != "max_length":
                raise
            sentence = f"this conversation has reached its {self._max_length} tokens: /reset begins a new one"
            raise RefusedError(sentence, error.code) from error

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()


class StepSession:
    """Stepping mode: one step at a time, logits back. Opened with the first step."""

    def __init__(
        self, client: ModelClient, batch: int, max_length: int, pads: tuple[int, ...], adapter: str | None
    ) -> None:
        self._client = client
        self._batch = batch
        self._max_length = max_length
        self._pads = pads
        self._adapter = adapter
        self._session: RemoteSession | None = None
        self._closed = False
        self._running = trio.CancelScope()

    @property
    def length(self) -> int:
        """Tokens per row that are in the caches."""
        return 0 if self._session is None else self._session.length

    async def step(
        self, rows: Sequence[Sequence[int]], position: int | None, want: Want, reorder: Sequence[int] | None
    ) -> Tensor:
        """See RemoteSession.step. Raises ValueError or TypeError for what no holder would take, LocalProtocolError
        when it is closed, also in the middle of the step.
        """
        if not self._closed:
            self._check(rows, position, reorder)
            with trio.CancelScope() as self._running:
                if self._session is None:
                    self._session = await self._client.open(
                        batch=self._batch, max_length=self._max_length, pads=self._pads, adapter=self._adapter
                    )
                return await self._session.step(rows, position=position, want=want, reorder=reorder)
        raise LocalProtocolError("this session is closed: open another")

    def _check(self, rows: Sequence[Sequence[int]], position: int | None, reorder: Sequence[int] | None) -> None:
        """Here, since a holder ends the session over it."""
        vocabulary = self._client.vocabulary
        if len(rows) != self._batch or len({len(row) for row in rows}) > 1:
            raise ValueError(f"ids are {self._batch} rows of equal length, one for each of the batch: pad on the left")
        if not all(0 <= operator.index(token) < vocabulary for row in rows for token in row):
            raise ValueError(f"a token id is a whole number from 0 up and below {vocabulary}")
        if position is not None and not 0 <= operator.index(position) <= self.length:
            raise ValueError(f"position is from 0 to {self.length}, the tokens that are cached")
        if reorder is not None and (
            len(reorder) != self._batch or not all(0 <= operator.index(row) < self._batch for row in reorder)
        ):
            raise ValueError(f"reorder names a row, from 0 up and below {self._batch}, for each of the batch")

    async def close(self) -> None:
        self._closed = True
        self._running.cancel()
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
