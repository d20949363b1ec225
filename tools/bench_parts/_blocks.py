"""A set of block-like files with their torrents, made once per benchmark."""

from __future__ import annotations

import os
from pathlib import Path

from torrentlm.manifest.torrent import Hasher, piece_length, single_file

_CHUNK = 1 << 20


def make_blocks(folder: Path, count: int, size: int) -> list[str]:
    """``count`` files of ``size`` random bytes in ``folder``; returns the paths of their torrents."""
    torrents = []
    for number in range(count):
        hasher = Hasher(length := piece_length(size))
        name = f"block-{number}.safetensors"
        with Path(folder, name).open("wb") as file:
            for start in range(0, size, _CHUNK):
                chunk = os.urandom(min(_CHUNK, size - start))
                file.write(chunk)
                hasher.update(chunk)
        path = Path(folder, f"block-{number}.torrent")
        path.write_bytes(single_file(name, hasher.finish(), length).to_bytes())
        torrents.append(str(path))
    return torrents
