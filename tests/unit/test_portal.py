"""The seam between blocking code and the event loop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel

from torrentlm.errors import LocalProtocolError, NetworkError
from torrentlm.portal import Portal
from torrentlm.structured import single_error


class Log:
    closed = False
    cancelled = 0


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def portal(log: Log) -> Iterator[Portal[Log]]:
    @asynccontextmanager
    async def manager() -> AsyncIterator[Log]:
        try:
            yield log
        finally:
            log.closed = True

    portal = Portal(manager)
    yield portal
    portal.close()


def test_results_and_errors_come_back(portal: Portal[Log]) -> None:
    async def answer() -> int:
        await trio.lowlevel.checkpoint()
        return 42

    async def fail() -> None:
        raise NetworkError("no")

    assert portal.run(answer) == 42
    with pytest.raises(NetworkError, match="no"):
        portal.run(fail)
    assert portal.run(answer) == 42


def test_a_stream_left_early_is_cancelled(portal: Portal[Log], log: Log) -> None:
    async def count(emit: Callable[[int], None]) -> None:
        try:
            for number in range(10_000):
                emit(number)
                await trio.sleep(0.001)
        finally:
            log.cancelled += 1

    stream = portal.stream(count)
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()  # type: ignore[attr-defined]
    assert log.cancelled == 1


def test_an_interrupted_wait_cancels_the_job(portal: Portal[Log], log: Log) -> None:
    async def sleep() -> None:
        try:
            await trio.sleep(60)
        finally:
            log.cancelled += 1

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        portal.run(sleep)
    assert time.monotonic() - started < 10 and log.cancelled == 1


def test_an_error_in_a_stream_comes_after_its_items(portal: Portal[Log]) -> None:
    async def work(emit: Callable[[str], None]) -> None:
        emit("one")
        raise NetworkError("gone")

    seen = []
    with pytest.raises(NetworkError, match="gone"):
        for item in portal.stream(work):
            seen.append(item)
    assert seen == ["one"]


def test_close_ends_jobs_and_the_manager(portal: Portal[Log], log: Log) -> None:
    portal.close()
    portal.close()
    assert log.closed

    async def late() -> None:
        pass

    with pytest.raises(LocalProtocolError, match="closed"):
        portal.run(late)


def test_what_the_manager_raises_is_raised_to_the_opener() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise NetworkError("port in use")
        yield

    with pytest.raises(NetworkError, match="port in use"):
        Portal(broken)


def test_why_the_manager_failed_is_told_to_whoever_waits_and_whoever_comes_later() -> None:
    fail = trio.Event()

    @asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        async def fails() -> None:
            await fail.wait()
            raise NetworkError("the port is gone")

        with single_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails)
                yield

    async def waits() -> None:
        fail.set()
        await trio.sleep_forever()

    portal = Portal(manager)
    for _ in range(2):
        with pytest.raises(NetworkError, match="the port is gone"):
            portal.run(waits)
    with pytest.raises(NetworkError, match="the port is gone"):
        list(portal.stream(lambda emit: waits()))
    portal.close()
