"""Where a publishing run gathers its files, and what it leaves for the next run if it is killed.

::

    <data>/publishing/source             which recipe and source the rest belongs to
    <data>/publishing/<root>.safetensors a complete block file
    <data>/publishing/<root>.torrent     its torrent, with all the hashes
    <data>/publishing/journal            a line of JSON for each complete file: what it was made from, name, stamp
    <data>/publishing/block.part         the file that is being written
    <data>/publishing/model/             the model torrent's content

A line is written after its file is on the disk. A later run of the same recipe over an unchanged source believes the
lines whose file still has the size and the time that they name, and writes only the others. Nothing in here is known to
the rest of a node: files appear in the store only when all of them are complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import Layout
from torrentlm.manifest.torrent import MAX_TORRENT, Torrent
from torrentlm.publish.writer import PART
from torrentlm.swarm.files import storage_error
from torrentlm.swarm.store import Store

FOLDER = "publishing"
MAX_LINE = 1000  # bytes of a journal's line that are worth reading

Stamp = tuple[int, int]


class Staging:
    """The folder, opened for the source that ``key`` names; what is there of another one is thrown away."""

    def __init__(self, store: Store, key: str) -> None:
        self.folder = store.data / FOLDER
        self._store = store
        if _read_text(self.folder / "source") != key:
            _discard(self.folder)  # the store is locked, so nobody uses it
            self.folder.mkdir()
            (self.folder / "source").write_text(key)
        _drop_unfinished(self.folder)
        self._entries = dict(self._read_journal())
        stamps = {torrent.name: stamp for torrent, stamp in self._entries.values()}
        for path in self.folder.glob("*.safetensors"):
            if stamps.get(path.name) != _stamp(path):
                path.unlink()  # nobody says that it is complete

    def find(self, made_from: str) -> Torrent | None:
        """The torrent of the file that an earlier run made from the same tensors, if it is here or in the store."""
        torrent, stamp = self._entries.get(made_from, (None, None))
        if torrent is None or stamp is None:
            return None
        if self._store.holds(torrent.name) or _stamp(self.folder / torrent.name) == stamp:
            return torrent
        if _stamp(self._store.path(torrent.name)) == stamp:  # killed between moving it there and saying so
            self._store.mark_verified(torrent.name)
            return torrent
        return None

    def add(self, made_from: str, torrent: Torrent) -> None:
        """``torrent``'s file is complete in the folder. Raises OSError."""
        path = self.folder / torrent.name
        stamp = _stamp(path)
        path.with_suffix(".torrent").write_bytes(torrent.to_bytes())
        with (self.folder / "journal").open("a", encoding="ascii") as journal:
            journal.write(json.dumps([made_from, torrent.name, stamp]) + "\n")
        if self._store.holds(torrent.name):
            path.unlink()

    @property
    def size(self) -> int:
        """Bytes of the complete files that are here."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _read_journal(self) -> Iterator[tuple[str, tuple[Torrent, Stamp]]]:
        """What the lines say, as far as they can be believed; the last one may be cut short."""
        for line in (_read_text(self.folder / "journal") or "").splitlines():
            with contextlib.suppress(ValueError, TypeError, OSError, ArtifactError):
                made_from, name, (size, modified) = json.loads(line[:MAX_LINE])
                path = self._store.path(name)  # a content address, and not a path to elsewhere
                with (self.folder / path.name).with_suffix(".torrent").open("rb") as file:
                    torrent = Torrent.from_bytes(file.read(MAX_TORRENT + 1))
                if torrent.name == name and torrent.size == size:
                    yield made_from, (torrent, (size, modified))


@contextmanager
def staging(store: Store, key: str) -> Iterator[Staging]:
    """A ``Staging`` that is gone afterwards, unless the run is interrupted; translates what the disk says.

    An error would come again, so nothing is kept for it. A run that is killed, or that Ctrl-C or a cancellation breaks
    off, leaves its complete files to the next one.
    """
    folder = store.data / FOLDER
    try:
        yield Staging(store, key)
    except OSError as error:
        _discard(folder)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"disk full while publishing into {store.data}; free some space there") from error
        raise storage_error(error, store.data) from error
    except Exception:
        _discard(folder)
        raise
    except BaseException:
        _drop_unfinished(folder)
        raise
    _discard(folder)


def made_from(layout: Layout, tensors: Mapping[str, str]) -> str:
    """A name for what goes into a file: its layout, and which tensors of the source those are."""
    return hashlib.sha256(layout.header + json.dumps(sorted(tensors.items())).encode()).hexdigest()


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _drop_unfinished(folder: Path) -> None:
    (folder / PART).unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
