"""Write one block file and hash it for both versions of BitTorrent in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import Layout
from torrentlm.manifest.torrent import Hasher, Torrent, piece_length, single_file
from torrentlm.publish.block_sink import BlockSink
from torrentlm.publish.convert import convert
from torrentlm.publish.source import Source

SMALLEST_PIECE = 256 * 1024
"""Bytes. Smaller pieces of a block would spread a little sooner and cost more: 14 MB make 54 of these."""
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
    with BlockSink(path, hasher, report) as sink:

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
