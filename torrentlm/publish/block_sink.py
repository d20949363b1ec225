"""Where a block file's bytes go as they are made: the disk, and the hashes of both versions of BitTorrent.

The bytes are gathered in a few aligned buffers. A full one is hashed by two threads and written by a third while the
caller fills the next, so that all of it takes as long as the slowest and not as long as their sum. Where the file
system knows how, the page cache is left out (``O_DIRECT``): filling it costs more time than all the rest, and it would
push out what other programs keep there.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torrentlm.manifest.torrent import Hasher
from torrentlm.publish.source import CHUNK

BUFFERS = 3
SYNC_EVERY = 64 * 1024 * 1024
"""Bytes written into the page cache between two requests to the disk: much less costs speed, much more and the end
waits for all of it."""


class BlockSink:
    """A new file at ``path``; call it with the file's bytes in order. ``report`` gets the size of each part handed on.

    The threads end and the file is closed with the ``with`` block. Everything raises OSError when the disk cannot take
    it.
    """

    def __init__(self, path: Path, hasher: Hasher, report: Callable[[int], None]) -> None:
        self._hasher = hasher
        self._report = report
        self._disk = _SequentialFile(path)
        self._threads = [ThreadPoolExecutor(1, f"publish-{name}") for name in ("v1", "v2", "disk")]
        self._buffers = [mmap.mmap(-1, CHUNK) for _ in range(BUFFERS)]  # mapped memory begins at a page
        self._under_way: list[Sequence[Future[None]]] = [()] * BUFFERS
        self._current = 0
        self._filled = 0

    def __call__(self, data: bytes | memoryview) -> None:
        """The bytes are copied at once."""
        left = memoryview(data).cast("B")
        while left:
            part = left[: CHUNK - self._filled]
            self._buffers[self._current][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == CHUNK:
                self._hand_on()

    def finish(self) -> None:
        """Return when all is hashed and on the disk."""
        if self._filled:
            self._hand_on()
        for number in range(BUFFERS):
            self._wait(number)
        self._disk.sync()

    def _hand_on(self) -> None:
        chunk = memoryview(self._buffers[self._current])[: self._filled]
        tasks = (self._hasher.update_v1, self._hasher.update_v2, self._disk.write)
        self._under_way[self._current] = [
            thread.submit(task, chunk) for thread, task in zip(self._threads, tasks, strict=True)
        ]
        self._current = (self._current + 1) % BUFFERS
        self._filled = 0
        self._wait(self._current)
        self._report(len(chunk))

    def _wait(self, number: int) -> None:
        for future in self._under_way[number]:
            future.result()
        self._under_way[number] = ()

    def __enter__(self) -> BlockSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._disk.close()


class _SequentialFile:
    """A file that is written once, from the beginning to the end, in whole pages but for the last part."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)  # a file system without it, such as some in memory
            self._direct = False
        else:
            self._direct = hasattr(os, "O_DIRECT")
        self._unsynced = 0

    def write(self, data: memoryview) -> None:
        if self._direct and len(data) % mmap.PAGESIZE:
            self._use_cache()
        while data:
            try:
                written = os.write(self._file, data)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._use_cache()  # pages of ours are not the disk's
                continue
            data = data[written:]
            if written % mmap.PAGESIZE:
                self._use_cache()
            self._unsynced += written
        if not self._direct and self._unsynced >= SYNC_EVERY:
            self.sync()

    def _use_cache(self) -> None:
        if self._direct:
            self._direct = False
            if sys.platform != "win32":
                import fcntl

                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def sync(self) -> None:
        os.fsync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        os.close(self._file)
