"""Foreign errors become ours, as one sentence each; handlers come and go."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import libtorrent as lt
import pytest
import trio

from torrentlm.errors import ArtifactError, DiskFullError, NetworkError, StorageError, TorrentLMError
from torrentlm.swarm.alerts import AlertPump, translate

FILE = Path("/data/blocks/x")


@pytest.mark.parametrize(
    ("code", "kind", "sentence"),
    [
        (lt.error_code(errno.ENOSPC, lt.system_category()), DiskFullError, "disk full: /data/blocks/x could not be"),
        (lt.error_code(errno.EDQUOT, lt.generic_category()), DiskFullError, "disk full: /data/blocks/x could not be"),
        (lt.error_code(errno.EFBIG, lt.system_category()), StorageError, "/data/blocks/x is larger than"),
        (lt.error_code(errno.EACCES, lt.system_category()), StorageError, "/data/blocks/x is not writable"),
        (lt.error_code(errno.EROFS, lt.system_category()), StorageError, "/data/blocks/x is not writable"),
        (lt.error_code(errno.ENOENT, lt.system_category()), StorageError, "/data/blocks/x is gone"),
        (lt.error_code(errno.EIO, lt.system_category()), StorageError, "/data/blocks/x could not be read or written ("),
        (lt.error_code(4, lt.libtorrent_category()), ArtifactError, "block x is not usable ("),
        (lt.error_code(1, lt.socks_category()), NetworkError, "block x: "),
    ],
)
def test_errors_are_translated(code: Any, kind: type[TorrentLMError], sentence: str) -> None:
    error = translate(code, FILE, "block x")
    assert type(error) is kind
    assert str(error).startswith(sentence)
    assert "\n" not in str(error)


class FakeSession:
    """As much of a session as the pump uses: the descriptor it writes to, and alerts."""

    def __init__(self) -> None:
        self.alerts: list[Any] = []
        self.descriptor = -1

    def set_alert_fd(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def pop_alerts(self) -> list[Any]:
        taken, self.alerts = self.alerts, []
        return taken


class Note(str):
    __slots__ = ()


def test_handlers_by_key_until_they_leave() -> None:
    session = FakeSession()
    pump = AlertPump(session)
    heard: list[str] = []
    with pump.handle("Note", heard.append), pump.handle("other", heard.append):
        session.alerts = [Note("one"), 2, Note("three")]
        pump.dispatch()
    session.alerts = [Note("four")]
    pump.dispatch()
    assert heard == ["one", "three"]
    pump.remove("Note", heard.append)


def test_handler_may_leave_while_it_is_called() -> None:
    session = FakeSession()
    pump = AlertPump(session)
    heard: list[str] = []

    def once(alert: Any) -> None:
        heard.append(alert)
        pump.remove("Note", once)

    pump.add("Note", once)
    pump.add("Note", heard.append)
    session.alerts = [Note("one"), Note("two")]
    pump.dispatch()
    assert heard == ["one", "one", "two"]


def test_cancelled_pump_lets_go_of_the_session() -> None:
    session = FakeSession()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(AlertPump(session).run)
            assert session.descriptor >= 0
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert session.descriptor == -1
