"""What ``import torrentlm`` gives: plain, blocking calls for scripts; the node runs in a thread of its own beneath.

>>> import torrentlm
>>> with torrentlm.connect("magnet:?…") as model:
...     for text in model.generate("Why is the sky blue?", chat=True, max_new_tokens=64, stream=True):
...         print(text, end="", flush=True)
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import trio

from torrentlm.client.generation import GenerationResult, RouteHop
from torrentlm.client.model import ChatSession, StepSession
from torrentlm.client.options import How, options_of, text_of
from torrentlm.config import Settings, load
from torrentlm.errors import LocalProtocolError
from torrentlm.node.client import SwarmClient, open_client
from torrentlm.node.compare import compare as compare_models
from torrentlm.node.seed import seed
from torrentlm.portal import Portal
from torrentlm.structured import single_error
from torrentlm.wire.messages import MAX_BATCH, MAX_TOKENS, Want

if TYPE_CHECKING:
    import torch

    from torrentlm.client.as_transformers import SwarmForCausalLM
    from torrentlm.client.pooling import Array

Hear = Callable[[str], None]
OnEvent = Callable[[dict[str, Any]], None]


def serve(settings: Settings, *, on_event: OnEvent, stop: threading.Event) -> None:
    """Publish or join what ``settings`` name, hold and serve blocks until ``stop`` is set. For ``on_event`` see
    docs/cli.md.

    Raises what keeps it from serving: ConfigError, ArtifactError, StorageError, NetworkError, UnsupportedModelError.
    """

    async def until_stopped() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(seed, settings, on_event)
            await trio.to_thread.run_sync(stop.wait, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    with single_error():
        trio.run(until_stopped)


def connect(
    target: str | Path,
    *,
    data: str | Path | None = None,
    port: int | None = None,
    peers: Sequence[str] | None = None,
    dht_bootstrap: Sequence[str] | str | None = None,
    settings: Settings | None = None,
    on_event: OnEvent = lambda event: None,
) -> Model:
    """Join the swarm of a model, as a client that holds nothing.

    ``target`` is a magnet link or the path of a model.toml. Options beat ``TORRENTLM_*``, which beat the file.
    Raises ConfigError, ArtifactError (wrong magnet), NetworkError (nobody there).
    """
    chosen = settings or _settings(target, data, port, peers, dht_bootstrap)
    return Model(Portal(lambda: open_client(chosen, on_event)))


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: str | Path | None = None,
    port: int | None = None,
    peers: Sequence[str] | None = None,
    dht_bootstrap: Sequence[str] | str | None = None,
    settings: tuple[Settings, Settings] | None = None,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Which blocks two models share, as plain values: what ``torrentlm inspect --diff --json`` prints (docs/cli.md).

    Targets, options and errors are those of :func:`connect`; models that the data folder knows need no swarm.
    """
    a, b = settings or (_settings(target, data, port, peers, dht_bootstrap) for target in (first, second))
    with single_error():
        return trio.run(compare_models, a, b, on_event)


def _settings(
    target: str | Path,
    data: str | Path | None,
    port: int | None,
    peers: Sequence[str] | None,
    dht_bootstrap: Sequence[str] | str | None,
) -> Settings:
    if port is None and not os.environ.get("TORRENTLM_PORT"):
        port = 0  # a seeding node of this machine has the usual one
    return load(target, overrides={"data": data, "port": port, "peers": peers, "dht_bootstrap": dht_bootstrap})


class _Closing(ABC):
    """Something that a ``with`` closes."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Model(_Closing):
    """A model in the swarm, ready to generate. Use it in a ``with``, or call :meth:`close`."""

    def __init__(self, portal: Portal[SwarmClient]) -> None:
        self._portal = portal
        self._client = portal.value
        self.last: GenerationResult | None = None
        """The newest finished generation."""

    def close(self) -> None:
        """Leave the swarm."""
        self._portal.close()

    @overload
    def generate(
        self,
        prompt: str,
        *,
        chat: bool = False,
        adapter: str | None = None,
        stream: Literal[False] = False,
        **options: Unpack[How],
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str,
        *,
        chat: bool = False,
        adapter: str | None = None,
        stream: Literal[True],
        **options: Unpack[How],
    ) -> Iterator[str]: ...
    def generate(
        self,
        prompt: str,
        *,
        chat: bool = False,
        adapter: str | None = None,
        stream: bool = False,
        **options: Unpack[How],
    ) -> str | Iterator[str]:
        """Continue ``prompt``, or with ``chat`` answer it through the chat template; options as in :class:`How`.

        ``adapter`` is the magnet link of an adapter made for this model; holders apply it to this generation alone.
        ``stream`` gives an iterator over pieces of text; leaving it early stops the holders. :attr:`last` has the
        figures. With a seed the same call gives the same tokens whatever the route.
        Raises RefusedError (too long, …), NoHolderError, HolderLostError; ArtifactError for a wrong adapter; TypeError
        and ValueError for options that cannot be meant.
        """
        text, asked = text_of(prompt), options_of(options)

        async def work(emit: Hear) -> None:
            self.last = await self._client.model.generate(text, asked, chat=chat, adapter=adapter, emit=emit)

        pieces = self._portal.stream(work)
        return pieces if stream else "".join(pieces)

    def embed(self, texts: str | Sequence[str], *, adapter: str | None = None) -> Array:
        """One vector for each text, float32 [texts, width]; of an encoder, pooled as the model's own files state.

        Texts that are longer than the model takes are cut; ``adapter`` as in :meth:`generate`. Raises RefusedError (no
        encoder, an empty text), NoHolderError, HolderLostError, ArtifactError; TypeError for what is no text.
        """
        wanted = [text_of(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return self._portal.run(lambda: self._client.embed(wanted, adapter))

    def chat(self, *, system: str | None = None, adapter: str | None = None) -> Chat:
        """A conversation with history, all of it with ``adapter``. Use it in a ``with``, or call its ``close``."""
        return Chat(self, self._portal, self._client.model.chat(None if system is None else text_of(system), adapter))

    def session(
        self,
        *,
        batch: int = 1,
        max_length: int = 512,
        pads: Sequence[int] | None = None,
        adapter: str | None = None,
    ) -> Session:
        """Stepping mode: full control, see :class:`Session`. ValueError for sizes that no session has."""
        if not 1 <= batch <= MAX_BATCH or not 1 <= max_length <= MAX_TOKENS:
            raise ValueError(f"a session has 1 to {MAX_BATCH} rows of 1 to {MAX_TOKENS} tokens")
        if pads is not None and (len(pads) != batch or not all(0 <= pad < max_length for pad in pads)):
            raise ValueError(f"pads are {batch} numbers, one per row, from 0 up and below max_length")
        pads = tuple(pads or (0,) * batch)
        return Session(self._portal, self._client.model.steps(batch, max_length, pads, adapter))

    def as_transformers(self, *, adapter: str | None = None) -> SwarmForCausalLM:
        """A model of transformers without weights, for its own ``generate()``: beam search, logits processors,
        stopping criteria, streamers; with ``adapter`` in all that it does. Close it, or use it in a ``with``.

        Raises ArtifactError or UnsupportedModelError if the model torrent's files are not a decoder's.
        """
        from torrentlm.client.as_transformers import SwarmForCausalLM  # transformers, which only this call needs

        return SwarmForCausalLM.load(
            self._client.membership.folder,
            self._client.model.tokenizer,
            lambda rows, length, pads: self.session(batch=rows, max_length=length, pads=pads, adapter=adapter),
        )

    def route(self) -> tuple[RouteHop, ...]:
        """The route that a generation would take now. Raises NoHolderError."""
        return self._portal.run(self._client.model.route)

    def stats(self) -> dict[str, Any]:
        """Peers, round trips and bytes, as plain values."""
        return self._portal.run(self._client.stats)

    def inspect(self) -> dict[str, Any]:
        """Blocks, files, hashes, tensors and who holds what, as plain values."""
        return self._portal.run(self._client.inspect)


class Chat(_Closing):
    """A conversation; the holders keep its KV-cache between turns."""

    def __init__(self, model: Model, portal: Portal[SwarmClient], session: ChatSession) -> None:
        self._model = model
        self._portal = portal
        self._session = session
        self._closed = False

    @property
    def system(self) -> str | None:
        return self._session.context.system

    @system.setter
    def system(self, text: str | None) -> None:
        self._session.context.system = None if text is None else text_of(text)

    @property
    def history(self) -> list[dict[str, str]]:
        """The messages so far, ``{"role": …, "content": …}`` each."""
        return list(self._session.context.messages)

    def send(self, text: str, **options: Unpack[How]) -> Iterator[str]:
        """Answer ``text`` in pieces. Leaving the iterator early stops the answer; what came stays in the history."""
        if self._closed:
            raise LocalProtocolError("this chat is closed: open another")
        said, asked = text_of(text), options_of(options)

        async def work(emit: Hear) -> None:
            self._model.last = await self._session.ask(said, asked, emit)

        return self._portal.stream(work)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._session.context.reset()

    def close(self) -> None:
        """Free what the holders keep for it."""
        self._closed = True
        self._portal.run(self._session.close)


class Session(_Closing):
    """Stepping mode: tokens in, logits out, with roll-back and row reorder. Use it in a ``with``.

    ``batch`` rows advance together; row r begins with ``pads[r]`` tokens of left padding.
    """

    def __init__(self, portal: Portal[SwarmClient], steps: StepSession) -> None:
        self._portal = portal
        self._steps = steps

    @property
    def length(self) -> int:
        """Tokens per row that the holders have cached."""
        return self._steps.length

    def step(
        self,
        ids: Sequence[Sequence[int]],
        *,
        position: int | None = None,
        last_only: bool = False,
        reorder: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Feed ``ids``, B rows of n >= 0 tokens, and return logits: [B, n, vocabulary], or [B, 1, …] with
        ``last_only``.

        A ``position`` below :attr:`length` first rolls the session back to it; ``reorder`` first lets row i go on
        from row ``reorder[i]``. Raises ValueError or TypeError for what cannot be meant, RefusedError (code
        "max_length" when the session is full), NoHolderError, HolderLostError.
        """
        want = Want.LOGITS_LAST if last_only else Want.LOGITS_ALL
        from torrentlm.compute.border import unpack  # torch, which only this call needs

        return unpack(self._portal.run(lambda: self._steps.step(ids, position, want, reorder)))

    def close(self) -> None:
        """Free what the holders keep for it."""
        self._portal.run(self._steps.close)
