"""Write one block file and hash it for both versions of BitTorrent in the same pass.

The caller's thread reads, converts and writes; three threads beside it compute the v1 hashes, the v2 hashes, and bring
what is written to the disk, so that publishing takes as long as the slowest of these and not as long as all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import Layout
from torrentlm.manifest.torrent import Hasher, Torrent, piece_length, single_file
from torrentlm.publish.convert import convert
from torrentlm.publish.source import BUFFERS, CHUNK, Source

SMALLEST_PIECE = 256 * 1024
"""Bytes. Smaller pieces of a block would spread a little sooner and cost more: 14 MB make 54 of these."""
SYNC_EVERY = 64 * 1024 * 1024
"""Bytes written between two requests to the disk: much less costs speed, much more and the end waits for all of it."""

PART = "block.part"
"""The file that is being written."""

Inspect = Callable[[str, memoryview, str], None]
"""Sees every chunk that is written: the tensor's name in the source, the elements, and their dtype in the file."""


def write_block(
    layout: Layout,
    tensors: Mapping[str, str],
    source: Source,
    folder: Path,
    report: Callable[[int], None],
    inspect: Inspect = lambda name, chunk, dtype: None,
) -> Torrent:
    """Write the file into ``folder`` under the name that its content gives it, and return its torrent.

    ``tensors`` maps names in the file to the source's; ``report`` gets the bytes written with every chunk. The file is
    on the disk when this returns. Raises OSError when the folder cannot take it, and what ``source``, ``report`` and
    ``inspect`` raise.
    """
    length = piece_length(layout.size, SMALLEST_PIECE)
    hasher = Hasher(length)
    dtypes = {placed.tensor.name: placed.tensor.dtype for placed in layout.tensors}
    path = folder / PART
    with path.open("wb", buffering=0) as file, _Pipeline(file, hasher, report) as sink:

        def read(name: str) -> Iterator[memoryview]:
            stored = source.tensors[tensors[name]]
            for chunk in convert(source.read(stored.name), stored.dtype, dtypes[name]):
                inspect(stored.name, chunk, dtypes[name])
                yield chunk

        canonical.write(layout, read, sink)
        sink.finish()  # the store will believe this file by its size and time alone
    hashes = hasher.finish()
    name = f"{hashes.root.hex()}.safetensors"
    if (folder / name).exists():
        path.unlink()  # an equal layer's, complete
    else:
        path.replace(folder / name)
    return single_file(name, hashes, length)


class _Pipeline:
    """What is called with each chunk of the file: hands it to the hashing threads and writes it.

    At most ``BUFFERS`` chunks are under way; a chunk may be overwritten once as many more have been handed in. The
    threads end with the ``with`` block.
    """

    def __init__(self, file: BinaryIO, hasher: Hasher, report: Callable[[int], None]) -> None:
        self._file = file
        self._hasher = hasher
        self._report = report
        self._v1, self._v2, self._disk = (ThreadPoolExecutor(1, f"publish-{name}") for name in ("v1", "v2", "disk"))
        self._hashing: list[tuple[Future[None], Future[None]]] = []
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __call__(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), CHUNK):
            self._take(view[at : at + CHUNK])

    def finish(self) -> None:
        """Wait until all is hashed and on the disk. Raises OSError."""
        self._wait(0)
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._file.fileno())

    def _take(self, chunk: memoryview) -> None:
        hasher = self._hasher
        self._hashing.append((self._v1.submit(hasher.update_v1, chunk), self._v2.submit(hasher.update_v2, chunk)))
        left = chunk
        while left:
            left = left[self._file.write(left) :]
        self._unsynced += len(chunk)
        if self._unsynced >= SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing, self._unsynced = self._disk.submit(os.fsync, self._file.fileno()), 0
        self._wait(BUFFERS - 1)
        self._report(len(chunk))

    def _wait(self, most: int) -> None:
        """Until at most ``most`` chunks are still being hashed."""
        while len(self._hashing) > most:
            for future in self._hashing.pop(0):
                future.result()

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._v1, self._v2, self._disk):
            pool.shutdown(wait=True, cancel_futures=True)
