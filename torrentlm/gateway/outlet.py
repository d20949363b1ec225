"""The sending side of one stream: writes at once what the kernel takes, the rest from a task of its own."""

from __future__ import annotations

from collections.abc import Callable

import trio

from torrentlm.gateway.outbox import Buffers
from torrentlm.gateway.tcp import MAX_BUFFERS, TcpStream


class Outlet:
    """Writes what ``source`` hands out.

    ``source()`` returns the next buffers to write, an empty list if there are none now.
    """

    def __init__(self, stream: TcpStream, source: Callable[[], Buffers]) -> None:
        self._stream = stream
        self._source = source
        self._batch: Buffers = []
        self._blocked = False
        self._wake = trio.Event()
        self._progress = trio.Event()

    @property
    def blocked(self) -> bool:
        """The kernel takes no more now; otherwise all that ``source`` gave has been written."""
        return self._blocked

    def pump(self) -> None:
        """Write until the kernel's buffer is full or there is nothing left; never waits. NetworkError if the stream
        broke.

        To be called whenever ``source`` may have something new.
        """
        if not self._blocked and not self._write():
            self._blocked = True
            self._wake.set()

    async def run(self) -> None:
        """Service: goes on where ``pump`` could not. NetworkError if the stream broke."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._blocked:
                await self._stream.writable()
                self._blocked = not self._write()
                self._progress.set()
                self._progress = trio.Event()

    async def progress(self) -> None:
        """Wait until more was written. Precondition: ``blocked``."""
        await self._progress.wait()

    async def flushed(self) -> None:
        """Wait until everything has been written, or will never be."""
        while self._blocked:
            await self._progress.wait()

    def abandon(self) -> None:
        """Nothing will be written any more: nobody needs to wait for it."""
        self._blocked = False
        self._progress.set()

    def _write(self) -> bool:
        """False: the kernel takes no more now."""
        while True:
            if not self._batch:
                self._batch = self._source()
                if not self._batch:
                    return True
            batch = self._batch[:MAX_BUFFERS]
            sent = self._stream.send_nowait(batch)
            done = 0
            while done < len(batch) and sent >= len(batch[done]):
                sent -= len(batch[done])
                done += 1
            del self._batch[:done]
            if done < len(batch):
                if sent:
                    self._batch[0] = memoryview(self._batch[0])[sent:]
                return False
