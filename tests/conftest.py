"""What every test gets: the guard that keeps it on loopback, and quiet libtorrent sessions to test against."""

from __future__ import annotations

import signal

from tests import loopback

loopback.install()
# A shell starts background jobs, which a CI run may be, with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import libtorrent as lt  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def stays_on_loopback() -> Iterator[None]:
    """Fail a test in which anything tried to leave loopback, even if the code under test swallowed the refusal."""
    loopback.take_refusals()
    yield
    refusals = loopback.take_refusals()
    assert not refusals, f"tried to leave loopback: {'; '.join(refusals)}"


@pytest.fixture
def plain_session() -> Iterator[Callable[..., Any]]:
    """Makes reference libtorrent clients with everything off; ``plain_session(enable_dht=True)`` overrides settings."""
    sessions: list[Any] = []

    def make(**settings: Any) -> Any:
        sessions.append(lt.session(loopback.QUIET | settings))
        return sessions[-1]

    yield make
    sessions.clear()
