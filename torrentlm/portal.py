"""A trio program in a thread of its own, for plain blocking code: the one seam between the two worlds.

``Portal`` runs an async context manager (the node) from start to close, and jobs inside it. A job that the blocking
side abandons (an exception such as KeyboardInterrupt while it waits, an early exit from a stream) is cancelled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from torrentlm.errors import LocalProtocolError, TorrentLMError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class _Job:
    work: Callable[[], Awaitable[object]]
    future: concurrent.futures.Future[object]
    scope: trio.CancelScope


class _ClosedError(LocalProtocolError):
    """A job has no manager to run in, or no longer."""


class Portal(Generic[T]):
    """Opens ``manager`` in a new thread; ``value`` is what it yields. Call :meth:`close` when done.

    Jobs raise LocalProtocolError once it is closed; if the manager failed by itself, the error that it failed with.
    """

    def __init__(self, manager: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._manager = manager
        self._opened: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._error: BaseException | None = None
        # A daemon, so that a script that never closes its model can still end.
        self._thread = threading.Thread(target=self._main, name="torrentlm", daemon=True)
        self._thread.start()
        try:
            self.value = self._opened.result()
        except BaseException:
            self.close()
            raise

    def _main(self) -> None:
        try:
            trio.run(self._run)
        except BaseException as error:
            self._error = error
            if not self._opened.done():
                self._opened.set_exception(error)
        finally:
            if not self._opened.done():
                self._opened.set_exception(LocalProtocolError("closed before it was open"))

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with self._manager() as value, trio.open_nursery() as self._nursery:
                self._opened.set_result(value)
                await trio.sleep_forever()

    async def _do(self, job: _Job) -> None:
        try:
            with job.scope:
                job.future.set_result(await job.work())
        except Exception as error:
            # Whatever a job raises belongs to the one who waits for it, in the other thread.
            job.future.set_exception(error)
        finally:
            if not job.future.done():
                job.future.set_exception(_ClosedError())

    def _submit(self, work: Callable[[], Awaitable[object]]) -> _Job:
        job = _Job(work, concurrent.futures.Future(), trio.CancelScope())

        def start() -> None:
            try:
                assert self._nursery is not None  # noqa: S101  set before the constructor returns
                self._nursery.start_soon(self._do, job)
            except RuntimeError:  # the nursery is closed
                job.future.set_exception(_ClosedError())

        self._on_loop(start)
        return job

    def _on_loop(self, call: Callable[[], object]) -> None:
        if self._token is None:
            raise _ClosedError
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            raise _ClosedError from None

    def _abandon(self, job: _Job) -> None:
        if not job.future.done():
            self._on_loop(job.scope.cancel)
            concurrent.futures.wait([job.future], timeout=5)

    def run(self, work: Callable[[], Awaitable[R]]) -> R:
        """Run ``work`` inside and wait for its result. Raises what it raises."""
        with self._explained():
            job = self._submit(work)
            try:
                return job.future.result()  # type: ignore[return-value]
            finally:
                self._abandon(job)

    def stream(self, work: Callable[[Callable[[R], None]], Awaitable[object]]) -> Iterator[R]:
        """Run ``work(emit)`` inside and yield what it emits. Raises what it raises, after the last item."""
        items: queue.SimpleQueue[tuple[bool, R | None]] = queue.SimpleQueue()

        async def guarded() -> object:
            try:
                return await work(lambda item: items.put((True, item)))
            finally:
                items.put((False, None))

        with self._explained():
            job = self._submit(guarded)
            try:
                while True:
                    more, item = items.get()
                    if not more:
                        break
                    yield item  # type: ignore[misc]
                job.future.result()
            finally:
                self._abandon(job)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn "closed" into why."""
        try:
            yield
        except _ClosedError:
            self._thread.join(timeout=5)  # it is on its way out, with the reason
            if isinstance(self._error, TorrentLMError):
                raise self._error from None
            raise LocalProtocolError("this model is closed: connect again") from self._error

    def close(self) -> None:
        """Close the manager and wait for its thread; twice is once."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(timeout=30)
