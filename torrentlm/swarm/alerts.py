"""libtorrent's alerts, brought into trio, and its errors, brought into ours.

libtorrent writes a byte to a socket whenever its alert queue stops being empty; one task waits for that byte, takes all
alerts and calls the handlers registered under each alert's key. An alert is only valid until the next batch is taken:
handlers copy what they need before they return.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import libtorrent as lt
import trio

from torrentlm.errors import ArtifactError, DiskFullError, NetworkError, StorageError, TorrentLMError

Alert = Any
Handler = Callable[[Alert], None]
Value = TypeVar("Value")


class AlertPump:
    """The only reader of a session's alerts."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._handlers: dict[Hashable, list[Handler]] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dispatch alerts until cancelled."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            self._session.set_alert_fd(theirs.fileno())
            try:
                task_status.started()
                while True:
                    await trio.lowlevel.wait_readable(ours)
                    with contextlib.suppress(BlockingIOError):
                        ours.recv(4096)
                    self.dispatch()
            finally:
                self._session.set_alert_fd(-1)

    def close(self) -> None:
        """Let go of the session, which can only end when nobody holds it."""
        self._session = None
        self._handlers.clear()

    def dispatch(self) -> None:
        """Take all alerts there are and hand each to its handlers."""
        for alert in self._session.pop_alerts():
            for key in _keys(alert):
                for handler in tuple(self._handlers.get(key, ())):
                    handler(alert)

    @contextlib.contextmanager
    def handle(self, key: Hashable, handler: Handler) -> Iterator[None]:
        """Call ``handler`` for each alert with ``key`` while the context lasts."""
        self.add(key, handler)
        try:
            yield
        finally:
            self.remove(key, handler)

    def add(self, key: Hashable, handler: Handler) -> None:
        self._handlers.setdefault(key, []).append(handler)

    def remove(self, key: Hashable, handler: Handler) -> None:
        handlers = self._handlers.get(key, [])
        if handler in handlers:
            handlers.remove(handler)
        if not handlers:
            self._handlers.pop(key, None)

    @contextlib.contextmanager
    def collect(self, key: Hashable, read: Callable[[Alert], Value]) -> Iterator[trio.MemoryReceiveChannel[Value]]:
        """A channel of ``read(alert)`` for each alert with ``key`` while the context lasts."""
        send, receive = trio.open_memory_channel[Value](math.inf)
        with send, receive, self.handle(key, lambda alert: send.send_nowait(read(alert))):
            yield receive


def torrent_key(handle: Any) -> Hashable:
    return "torrent", hash(handle)


def peers_key(info_hash: bytes) -> Hashable:
    return "peers", info_hash


def item_key(node: bytes, salt: bytes) -> Hashable:
    return "item", node, salt


def put_key(node: bytes, salt: bytes) -> Hashable:
    return "put", node, salt


def _keys(alert: Alert) -> Iterator[Hashable]:
    """What an alert is about. Alerts nobody asked for have keys nobody registered."""
    match alert:
        case lt.state_update_alert():
            yield "updates"
        case lt.dht_get_peers_reply_alert():
            yield peers_key(alert.info_hash.to_bytes())
        case lt.dht_mutable_item_alert():
            yield item_key(bytes(alert.key), _octets(alert.salt))
        case lt.dht_put_alert():
            yield put_key(bytes(alert.public_key), _octets(alert.salt))
        case lt.dht_stats_alert():
            yield "dht"
        case lt.torrent_alert():
            yield torrent_key(alert.handle)
        case _:
            yield type(alert).__name__


def _octets(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


def translate(error: Any, path: Path | str, what: str) -> TorrentLMError:
    """libtorrent's error_code as one of our errors: ``what`` failed, ``path`` is the file or folder concerned."""
    category, value, said = error.category().name(), error.value(), error.message()
    if category in {"system", "generic"}:
        if value in {errno.ENOSPC, errno.EDQUOT}:
            return DiskFullError(f"disk full: {path} could not be written; free some space or hold fewer blocks")
        if value == errno.EFBIG:
            return StorageError(f"{path} is larger than a file may be there; choose another disk or raise the limit")
        if value in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return StorageError(f"{path} is not writable; check the data folder's owner and mode")
        if value == errno.ENOENT:
            return StorageError(f"{path} is gone; it was removed while in use, restart to fetch it again")
        return StorageError(f"{path} could not be read or written ({said.lower()}); check the disk")
    if category == "libtorrent":
        return ArtifactError(f"{what} is not usable ({said.lower()})")
    return NetworkError(f"{what}: {said.lower()}")
