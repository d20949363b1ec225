"""Write one block file and hash it for both versions of BitTorrent in the same pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import Layout
from torrentlm.manifest.torrent import Hasher, Torrent, piece_length, single_file
from torrentlm.publish.convert import convert
from torrentlm.publish.source import Source

SMALLEST_PIECE = 256 * 1024
"""Bytes. Smaller pieces of a block would spread a little sooner and cost more: 14 MB make 54 of these."""


def write_block(
    layout: Layout, tensors: Mapping[str, str], source: Source, folder: Path, report: Callable[[int], None]
) -> Torrent:
    """Write the file into ``folder`` under the name that its content gives it, and return its torrent.

    ``tensors`` maps names in the file to the source's; ``report`` gets the bytes written with every chunk. Raises
    OSError when the folder cannot take the file, and what ``source`` and ``report`` raise.
    """
    length = piece_length(layout.size, SMALLEST_PIECE)
    hasher = Hasher(length)
    dtypes = {placed.tensor.name: placed.tensor.dtype for placed in layout.tensors}
    path = folder / "block.part"
    with path.open("wb", buffering=0) as file:

        def read(name: str) -> Iterator[memoryview]:
            stored = source.tensors[tensors[name]]
            return convert(source.read(stored.name), stored.dtype, dtypes[name])

        def sink(data: bytes | memoryview) -> None:
            view = memoryview(data)
            hasher.update(view)
            left = view
            while left:
                left = left[file.write(left) :]
            report(len(view))

        canonical.write(layout, read, sink)
        os.fsync(file.fileno())  # the store will believe this file by its size and time alone
    hashes = hasher.finish()
    name = f"{hashes.root.hex()}.safetensors"
    path.replace(folder / name)
    return single_file(name, hashes, length)
