"""The way to the disk: every byte in its order, whatever the pieces' sizes and the file system; errors come out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from torrentlm.manifest.torrent import Hasher, pieces_root
from torrentlm.publish.block_sink import BUFFERS, BlockSink
from torrentlm.publish.source import CHUNK

LENGTH = 256 * 1024


def put(path: Path, data: bytes, sizes: list[int]) -> Hasher:
    hasher = Hasher(LENGTH)
    reported = []
    with BlockSink(path, hasher, reported.append) as sink:
        left = memoryview(data)
        while left:
            size = sizes[len(left) % len(sizes)]
            sink(left[:size])
            left = left[size:]
        sink.finish()
    assert sum(reported) == len(data)
    return hasher


@pytest.mark.parametrize("size", [1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, (BUFFERS + 1) * CHUNK + 5000])
def test_what_lies_on_the_disk(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    hasher = put(tmp_path / "file", data, [3 * CHUNK, 70_001])
    assert (tmp_path / "file").read_bytes() == data
    assert hasher.finish().root == pieces_root(tmp_path / "file")


@pytest.mark.parametrize("where", ["open", "write"])
def test_file_systems_that_know_no_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    data = os.urandom(CHUNK + 77)
    refused = 0

    def refuse() -> OSError:
        nonlocal refused
        refused += 1
        return OSError(errno.EINVAL, "no")

    if where == "open":
        original_open = os.open

        def opened(path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT:
                raise refuse()
            return original_open(path, flags, mode)

        monkeypatch.setattr(os, "open", opened)
    else:
        original_write = os.write

        def written(file: int, part: memoryview) -> int:
            if not refused:
                raise refuse()
            return original_write(file, part)

        monkeypatch.setattr(os, "write", written)
    put(tmp_path / "file", data, [CHUNK])
    assert refused == 1
    assert (tmp_path / "file").read_bytes() == data


def test_a_full_disk_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, part: memoryview) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    for size in (3 * CHUNK, 5):
        with pytest.raises(OSError, match="full"):
            put(tmp_path / "file", bytes(size), [CHUNK])
