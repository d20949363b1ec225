"""Small files that are written whole or not at all, and what the operating system says, in this program's words."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torrentlm.errors import DiskFullError, StorageError

MAX_JSON = 8 << 20
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """All or nothing, even if the process dies half-way; the mode holds from the first byte on.

    ``durable``: even if the power fails. What only saves work need not wait for the disk.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk each byte is somebody's
        raise
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content, or None if the file is absent, damaged or absurdly large: such files only save work."""
    try:
        if path.stat().st_size > MAX_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate OSError to StorageError, once, here."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """One sentence for what the operating system said about ``path``."""
    where, said = error.filename or path, (error.strerror or str(error)).lower()
    if error.errno in NO_SPACE:
        return DiskFullError(f"disk full: {where} could not be written; free some space or hold fewer blocks")
    if error.errno in _NOT_WRITABLE:
        return StorageError(f"{where}: {said}; make the data folder writable, or choose another one with --data")
    return StorageError(f"{where}: {said}; check the data folder")
