"""What the block files of a data folder take, who needs them, and what of them goes when others need the room.

    <data>/used.json         when each block file was last used, in seconds since 1970

Pins and promises last as long as the process; the last use is remembered. The decision is ``disk_cache.plan``'s.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from pathlib import Path

from torrentlm.errors import DiskFullError, StorageError
from torrentlm.swarm.disk_cache import Eviction, Kept, Refusal, plan
from torrentlm.swarm.files import read_json, storage_errors, write_atomically
from torrentlm.swarm.store import Store


class Space:
    """The room for block files under ``budget`` bytes (None: what the disk has). Its methods block on the disk only."""

    def __init__(self, store: Store, budget: int | None, clock: Callable[[], float] = time.time) -> None:
        self.budget = budget
        self._store = store
        self._clock = clock
        self._path = store.data / "used.json"
        self._uses = {name: when for name, when in _read_uses(self._path).items() if (store.blocks / name).exists()}
        self._pins: dict[str, set[Hashable]] = {}
        self._promised: dict[str, int] = {}
        self._promises: Counter[str] = Counter()

    # -- who needs what

    def pin(self, names: Iterable[str], reason: Hashable) -> None:
        """Keep these files, here or still to come, until ``unpin`` with the same reason."""
        for name in names:
            self._pins.setdefault(name, set()).add(reason)

    def unpin(self, names: Iterable[str], reason: Hashable) -> None:
        """Take a reason back; a file without any may be evicted."""
        for name in names:
            reasons = self._pins.get(name, set())
            reasons.discard(reason)
            if not reasons:
                self._pins.pop(name, None)

    def pinned(self, name: str) -> bool:
        """Whether the file must stay: somebody pinned it, or it is on its way."""
        return name in self._pins or name in self._promised

    @property
    def promised(self) -> frozenset[str]:
        """The names of files that are on their way."""
        return frozenset(self._promised)

    def used(self, names: Iterable[str]) -> None:
        """Somebody had a use for these files now. What cannot be written is forgotten at the end: it only orders."""
        now = self._clock()
        self._uses.update(dict.fromkeys(names, now))
        self._save_uses()

    # -- what fits

    def make_room(self, files: Mapping[str, int]) -> tuple[str, ...]:
        """What must be evicted so that the block files (name: size in bytes) fit, longest unused first.

        Whoever asks evicts, and then promises the files. Raises DiskFullError or StorageError if there is no room.
        """
        budget = self.budget
        with storage_errors(self._store.data):
            kept, free = self.kept(), self._free()
        match plan(files, kept, budget, free):
            case Eviction(names):
                return names
            case Refusal(missing, staying, enough, _, _) if budget is not None and enough is not None:
                raise StorageError(
                    f"disk = {budget / 1e6:,.1f} MB is too small: {self._store.blocks} has {staying / 1e6:,.1f} MB of "
                    f"block files that must stay, and the blocks to fetch need {missing / 1e6:,.1f} MB more; raise "
                    f"--disk to {_up(enough):,.1f} MB or hold fewer blocks"
                )
            case Refusal(missing=missing, evictable=evictable):
                room = free + sum(kept[name].taken for name in evictable)
                raise disk_full(missing, room, self._store.data)

    def make_any_room(self) -> tuple[str, ...]:
        """What must be evicted so that all that is promised fits; everything that may be, where that is not enough."""
        with storage_errors(self._store.data):
            decided = plan({}, self.kept(), self.budget, self._free())
        return decided.names if isinstance(decided, Eviction) else decided.evictable

    def require_free(self, size: int) -> None:
        """Raise DiskFullError unless the disk has ``size`` bytes beside what is promised to block files."""
        with storage_errors(self._store.data):
            free = self._free() - sum(file.whole - file.taken for file in self.kept().values())
        if size > free:
            raise disk_full(size, max(0, free), self._store.data)

    def room(self, besides: Collection[str] = ()) -> int:
        """Bytes that further block files may take if all goes that may go, but nothing of ``besides``."""
        with storage_errors(self._store.data):
            kept, free = self.kept(), self._free()
        whole = sum(file.whole for file in kept.values())
        room = free - sum(file.whole - file.taken for file in kept.values())
        room = room if self.budget is None else min(room, self.budget - whole)
        return room + sum(file.taken for name, file in kept.items() if not file.pinned and name not in besides)

    def fits(self, name: str, size: int) -> bool:
        """Whether the disk has room for the rest of this file, whatever the others need."""
        with storage_errors(self._store.data):
            return self._free() >= max(MARGIN, size - allocated(self._store.path(name)))

    def missing(self, files: Mapping[str, int]) -> int:
        """Bytes of these block files (name: size) that are not on the disk yet."""
        holds, path = self._store.holds, self._store.path
        return sum(max(0, size - allocated(path(name))) for name, size in files.items() if not holds(name))

    def occupied(self) -> int:
        """Bytes of all block files, those fetched in part, too."""
        with storage_errors(self._store.data):
            return sum(file.taken for file in self.kept().values())

    def kept(self) -> dict[str, Kept]:
        """Every file in the folder, or on its way there. Raises OSError."""
        found = {}
        for path in self._store.blocks.iterdir():
            name, ours = path.name, self._store.is_name(path.name)
            # A complete file counts whole, however tightly the file system packs it.
            taken = path.stat().st_size if ours and self._store.holds(name) else allocated(path)
            pinned = self.pinned(name) or not ours  # what is not ours is not ours to remove
            used = self._uses.get(name) or _modified(path)
            found[name] = Kept(taken, max(taken, self._promised.get(name, 0)), used, pinned)
        for name in self._promised.keys() - found.keys():
            found[name] = Kept(0, self._promised[name], 0.0, pinned=True)
        return found

    # -- what comes and goes

    def promise(self, files: Mapping[str, int]) -> None:
        """The rest of these files (name: size in bytes) is coming: it counts, and they stay, until it is taken back."""
        self._promised.update(files)
        self._promises.update(files.keys())

    def take_back(self, names: Iterable[str]) -> tuple[str, ...]:
        """End a promise for each of these; returns those that nobody else promised."""
        ended = []
        for name in names:
            self._promises[name] -= 1
            if self._promises[name] <= 0:
                del self._promises[name]
                self._promised.pop(name, None)
                ended.append(name)
        return tuple(ended)

    def withdraw(self, name: str) -> None:
        """First half of an eviction: from now on the file is not here, whenever the process dies."""
        with contextlib.suppress(DiskFullError):  # written with the next change; a record without a file says nothing
            self._store.mark_unverified(name)
        self._uses.pop(name, None)

    def remove(self, name: str) -> None:
        """Second half: free its room. Nobody must have it open for writing any more."""
        path = self._store.path(name)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def _free(self) -> int:
        return shutil.disk_usage(self._store.data).free

    def _save_uses(self) -> None:
        try:
            write_atomically(self._path, json.dumps(self._uses, indent=0, sort_keys=True), durable=False)
        except OSError:
            return  # a full disk; the next use writes it


MARGIN = 1 << 16
"""Bytes that must be free beside nothing: the records of what is complete are written too."""


def disk_full(needed: int, room: int, folder: Path) -> DiskFullError:
    """``room`` is what is free, and what block files would leave that may go."""
    return DiskFullError(
        f"disk full: block set needs {needed / 1e6:,.0f} MB, {folder} has {room / 1e6:,.0f} MB free; "
        "free some, choose another folder with --data, or hold fewer blocks"
    )


def allocated(path: Path) -> int:
    """Bytes on disk: a file fetched in part is sparse, its size says nothing; nor does the slack of its last page."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_uses(path: Path) -> dict[str, float]:
    entries = read_json(path)
    if not isinstance(entries, dict):
        return {}
    return {name: when for name, when in entries.items() if Store.is_name(name) and isinstance(when, int | float)}


def _up(size: int) -> float:
    """Bytes as MB with one digit, rounded up: a number that is said to be enough must be."""
    return -(-size // 100_000) / 10
