"""A session's handles on the holders of its route: opened, leased, listened to and closed together."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from torrentlm.errors import HolderLostError, NetworkError, RefusedError
from torrentlm.records import AdapterId, NodeKey, SessionId, Span
from torrentlm.route.plan import Hop
from torrentlm.wire.messages import Close, Encoded, Fail, Message, NextHop, Open, Opened, Renew
from torrentlm.wire.tensors import Tensor

OPEN_TIMEOUT_S = 20.0
ADAPTER_TIMEOUT_S = 40.0
"""More, where holders may have to fetch an adapter first; they give up sooner themselves."""
LEASE_S = 30.0
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
class Opening:
    """What the holders are asked to open: ``batch`` rows of at most ``max_length`` tokens, ``pads`` as in Open;
    ``encoded`` is what an encoder made, for a decoder.
    """

    model: bytes
    batch: int
    max_length: int
    pads: tuple[int, ...]
    encoded: tuple[Tensor, ...] = ()
    adapter: ChosenAdapter | None = None


@dataclass(frozen=True, slots=True)
class _Lost:
    """A holder's pipe is dead: put into the inbox by its watcher."""

    hop: int


class Handles:
    """A handle on each of ``hops``; ``labels`` name the holders in messages to a person.

    ``culprit`` is the holder that the last failure is about; ``lost``: a holder went away or refused, so nothing more
    will come.
    """

    def __init__(self, links: Links, hops: Sequence[Hop], labels: Sequence[str]) -> None:
        self.hops = tuple(hops)
        self.labels = tuple(labels)
        self.ids = tuple(SessionId(secrets.token_bytes(16)) for _ in hops)
        self.culprit: NodeKey | None = None
        self.lost = False
        self._links = links
        self._lease_s = LEASE_S
        self._scope = trio.CancelScope()
        self._closed = False
        self._send_inbox, self._inbox = trio.open_memory_channel[Message | _Lost](1024)
        for hop, handle in zip(self.hops, self.ids, strict=True):
            links.listen(handle, hop.node, self._send_inbox)

    async def open(self, opening: Opening) -> None:
        """Open the session on every holder. Raises RefusedError, HolderLostError, NetworkError."""
        waiting = dict.fromkeys(self.ids)
        limit = OPEN_TIMEOUT_S + (ADAPTER_TIMEOUT_S if opening.adapter is not None else 0)
        with trio.move_on_after(limit):
            for index in range(len(self.hops)):
                self.culprit = self.hops[index].node
                await self._links.connect(self._next_hop(index))
                await self.send(index, self.open_message(index, opening))
            while waiting:
                self.culprit = self.hops[self.ids.index(next(iter(waiting)))].node
                message = await self.next(epoch=0)
                if isinstance(message, Opened):
                    waiting.pop(message.session, None)
                    self._lease_s = min(self._lease_s, message.lease_ms / 1000)
            for index, handle in enumerate(self.ids if opening.encoded else ()):
                self.culprit = self.hops[index].node
                await self.send(index, Encoded(handle, opening.encoded))
            self.culprit = None
            return
        label = next(label for hop, label in zip(self.hops, self.labels, strict=True) if hop.node == self.culprit)
        raise HolderLostError(f"{label} did not open a session within {limit:.0f} s: try again")

    def _next_hop(self, index: int) -> NextHop:
        hop = self.hops[index]
        return NextHop(hop.node, hop.endpoint.host, hop.endpoint.port, self.ids[index])

    def open_message(self, index: int, opening: Opening) -> Open:
        """What the holder of that hop is sent."""
        span = self.hops[index].span
        return Open(
            session=self.ids[index],
            epoch=0,
            model=opening.model,
            first=span.first,
            last=span.last,
            prev=(self.hops[index - 1].node,),
            next=self._next_hop((index + 1) % len(self.hops)),
            batch=opening.batch,
            max_length=opening.max_length,
            lease_ms=int(LEASE_S * 1000),
            pads=opening.pads,
            source=opening.encoded[1].shape[1] if opening.encoded else 0,
            adapter=None if opening.adapter is None else opening.adapter.needed_by(span),
        )

    async def next(self, epoch: int) -> Message:
        """The next message of any holder; failures of this ``epoch`` or a later one become exceptions."""
        message = await self._inbox.receive()
        if isinstance(message, _Lost):
            self.lost, self.culprit = True, self.hops[message.hop].node
            raise HolderLostError(f"{self.labels[message.hop]} went away in the middle of the session: ask again")
        if isinstance(message, Fail) and message.epoch >= epoch:
            hop = self.ids.index(message.session)
            label = self.labels[hop]
            self.lost, self.culprit = True, self.hops[hop].node
            if message.code == "lost_next":
                raise HolderLostError(f"{label} lost the next holder on the route ({message.message}): ask again")
            raise RefusedError(f"{label}: {message.message}", message.code)
        return message

    async def send(self, hop: int, message: Message) -> None:
        """Raises HolderLostError."""
        try:
            await self._links.send(self.hops[hop].node, message, self.ids[hop])
        except NetworkError as error:
            self.lost, self.culprit = True, self.hops[hop].node
            raise HolderLostError(f"{self.labels[hop]} cannot be reached any more ({error}): ask again") from error

    async def tell_all(self, make: Callable[[SessionId], Message]) -> None:
        """Send every holder that can be reached a message about its handle, for at most ``CLOSE_TIMEOUT_S``, even when
        cancelled: a last word."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            for hop, handle in zip(self.hops, self.ids, strict=True):
                try:
                    await self._links.send(hop.node, make(handle), handle)
                except NetworkError:
                    continue  # one that is gone keeps nothing

    async def keep(self) -> None:
        """While the session is open: renew its leases, notice lost holders."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for index in range(len(self.hops)):
                    nursery.start_soon(self._watch, index)
                while True:
                    await trio.sleep(self._lease_s / 3)
                    for hop, handle in enumerate(self.ids):
                        try:
                            await self._links.send(self.hops[hop].node, Renew((handle,)), handle)
                        except NetworkError:
                            await self._send_inbox.send(_Lost(hop))

    async def _watch(self, index: int) -> None:
        await self._links.wait_lost(self.hops[index].node)
        await self._send_inbox.send(_Lost(index))

    async def close(self) -> None:
        """Free what the holders keep; twice is once. A holder that cannot be told frees it when the lease ends."""
        if self._closed:
            return
        self._closed = True
        self._scope.cancel()
        await self.tell_all(Close)
        for hop, handle in zip(self.hops, self.ids, strict=True):
            self._links.stop_listening(handle, hop.node)
