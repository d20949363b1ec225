"""Who is on the way to whom: incoming connections that wait for our client, and dials that have not been answered.

Both are known by (where the peer listens, torrent). If two nodes dial each other for one torrent at the same time,
the dial of the node with the lower key is the one that counts: the other node uses the incoming connection in place
of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

from torrentlm.gateway.tcp import TcpStream
from torrentlm.records import Endpoint, InfoHash
from torrentlm.wire.peerwire import Greeting

_REMEMBERED = 4096
_REMEMBERED_FOR = 600.0


class Key(NamedTuple):
    peer: Endpoint
    torrent: InfoHash


class Visitor:
    """An incoming connection that has greeted; its peer listens at ``peer``. Whoever takes it owns the stream."""

    def __init__(self, stream: TcpStream, greeting: Greeting, peer: Endpoint) -> None:
        self.stream = stream
        self.greeting = greeting
        self.peer = peer
        self.taken = trio.Event()


class Dial:
    """A dial of ours that is under way; ``visitor`` is set if the peer's own came first."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.visitor: Visitor | None = None


class Rendezvous:
    """Pending joins and dials. No I/O."""

    def __init__(self) -> None:
        self._visitors: dict[Key, Visitor] = {}
        self._dials: dict[Key, Dial] = {}
        self._not_listening: OrderedDict[Endpoint, float] = OrderedDict()

    @contextmanager
    def waiting(self, key: Key, visitor: Visitor) -> Iterator[None]:
        """Let our client find ``visitor``; a later visitor under the same key takes its place."""
        self._visitors[key] = visitor
        try:
            yield
        finally:
            if self._visitors.get(key) is visitor:
                del self._visitors[key]

    def expects(self, endpoint: Endpoint) -> bool:
        """Whether a visitor from there waits."""
        return any(key.peer == endpoint for key in self._visitors)

    def take_visitor(self, key: Key) -> Visitor | None:
        visitor = self._visitors.pop(key, None)
        if visitor is not None:
            visitor.taken.set()
        return visitor

    @contextmanager
    def dialing(self, key: Key) -> Iterator[Dial]:
        """A dial of ours for the time that it takes. At most one per key."""
        dial = self._dials[key] = Dial()
        try:
            yield dial
        finally:
            if self._dials.get(key) is dial:
                del self._dials[key]

    def dial(self, key: Key) -> Dial | None:
        return self._dials.get(key)

    def hand_over(self, dial: Dial, visitor: Visitor) -> None:
        """The peer's dial counts instead of ours."""
        visitor.taken.set()
        dial.visitor = visitor
        dial.scope.cancel()

    def add_source_port(self, endpoint: Endpoint) -> None:
        """Remember that this is where a connection came from, not where anybody listens: it is not to be dialed."""
        self._not_listening[endpoint] = trio.current_time()
        if len(self._not_listening) > _REMEMBERED:
            self._not_listening.popitem(last=False)

    def is_source_port(self, endpoint: Endpoint) -> bool:
        return trio.current_time() - self._not_listening.get(endpoint, -_REMEMBERED_FOR) < _REMEMBERED_FOR
