"""The sidecar of one model: the one that this node made, one that it heard and found right, and those of its peers.

A sidecar is signed by nobody, so what a peer sends is advice: see ``judge`` in node/recheck.py for what is made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from torrentlm.errors import ArtifactError, NetworkError
from torrentlm.gateway.pipe import Pipe
from torrentlm.manifest.sidecar import MAX_BYTES, Sidecar
from torrentlm.node.parts import Parts
from torrentlm.records import NodeKey, SessionId
from torrentlm.wire.messages import AskSidecar, SidecarBytes
from torrentlm.wire.tensors import Tensor

ASK_LIMIT_S = 10.0
ASK_PEERS = 4
MAX_ANSWERING = 16
"""Peers that are being answered at a time; others are not, and ask somebody else."""


@dataclass(frozen=True, slots=True)
class Found:
    """A sidecar and who says so: "this node", or a peer's address. ``own``: made here, so to be believed."""

    sidecar: Sidecar
    content: bytes
    source: str
    own: bool = False

    def described(self) -> dict[str, Any]:
        """What ``inspect --json`` says."""
        return {**self.sidecar.described(), "source": self.source}


class Sidecars:
    """Asks for them and answers who asks. ``peers`` names the nodes of this model that are worth asking, best first."""

    def __init__(self, parts: Parts, model: bytes, peers: Callable[[], Sequence[NodeKey]]) -> None:
        self._parts = parts
        self._model = model
        self._peers = peers
        self._asked: dict[NodeKey, trio.MemorySendChannel[bytes]] = {}
        self._answering: set[NodeKey] = set()

    async def stored(self) -> Found | None:
        """The one that was made here, else the one heard before; None without either. Raises StorageError."""
        for heard in (False, True):
            content = await trio.to_thread.run_sync(self._load, heard)
            if content is not None and (sidecar := self._read(content)) is not None:
                return Found(sidecar, content, "this node" if not heard else "a peer, earlier", own=not heard)
        return None

    async def keep(self, found: Found) -> None:
        """Remember what a peer sent, since a block here agrees with it, and pass it on. Raises StorageError."""
        await trio.to_thread.run_sync(partial(self._parts.store.save_sidecar, self._model, found.content, heard=True))

    async def ask(self) -> list[Found]:
        """What up to ``ASK_PEERS`` connected peers have, each content once. Takes ``ASK_LIMIT_S`` at most."""
        pipes = self._parts.gateway.pipes
        asked = [pipes[node] for node in self._peers() if node in pipes and node not in self._asked][:ASK_PEERS]
        found: dict[bytes, Found] = {}
        with trio.move_on_after(ASK_LIMIT_S):
            async with trio.open_nursery() as nursery:
                for pipe in asked:
                    nursery.start_soon(self._ask, pipe, found)
        return list(found.values())

    async def find(self) -> Found | None:
        """Any: the stored one, else a peer's. Raises StorageError."""
        return await self.stored() or next(iter(await self.ask()), None)

    async def _ask(self, pipe: Pipe, found: dict[bytes, Found]) -> None:
        self._asked[pipe.peer], answer = trio.open_memory_channel[bytes](1)
        try:
            await pipe.send(AskSidecar(self._model), self._stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_closed, pipe, nursery.cancel_scope)
                content = await answer.receive()
                if (sidecar := self._read(content)) is not None:
                    found.setdefault(hashlib.sha256(content).digest(), Found(sidecar, content, str(pipe.endpoint)))
                nursery.cancel_scope.cancel()
        except NetworkError:
            return  # another may answer
        finally:
            del self._asked[pipe.peer]

    # -- messages

    def hear(self, sender: NodeKey, message: AskSidecar | SidecarBytes, nursery: trio.Nursery) -> None:
        """A peer asks, or answers what it was asked; anything else is passed over."""
        if message.model != self._model:
            return
        if isinstance(message, AskSidecar):
            if sender not in self._answering and len(self._answering) < MAX_ANSWERING:
                self._answering.add(sender)
                nursery.start_soon(self._answer, sender)
        elif (waiting := self._asked.get(sender)) is not None and message.content.nbytes <= MAX_BYTES:
            try:
                waiting.send_nowait(bytes(message.content.data))
            except (trio.WouldBlock, trio.BrokenResourceError):
                return  # one answer is enough

    async def _answer(self, peer: NodeKey) -> None:
        try:
            found = await self.stored()
            content = b"" if found is None else found.content
            pipe = self._parts.gateway.pipes.get(peer)
            if pipe is not None:
                with trio.move_on_after(ASK_LIMIT_S):
                    await pipe.send(SidecarBytes(self._model, Tensor("U8", (len(content),), content)), self._stream)
        except NetworkError:
            return
        finally:
            self._answering.discard(peer)

    # -- inner workings

    @property
    def _stream(self) -> int:
        """Not that of the records, which are small and urgent."""
        return Pipe.stream_of(SessionId(self._model[:16]))

    def _load(self, heard: bool) -> bytes | None:
        return self._parts.store.load_sidecar(self._model, heard=heard)

    def _read(self, content: bytes) -> Sidecar | None:
        try:
            return Sidecar.from_bytes(content, self._model)
        except ArtifactError:
            return None


async def _cancel_when_closed(pipe: Pipe, scope: trio.CancelScope) -> None:
    await pipe.closed.wait()
    scope.cancel()
