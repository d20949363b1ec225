"""Files are believed by their size and time; here they are hashed all the same, one after the other, slowly.

A bad disk alters a file without touching either. The pace keeps this out of everybody's way: a thread of the lowest
priority would do as much on an idle machine, and hold up the interpreter's lock on a busy one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import trio

from torrentlm.manifest.torrent import MAX_PIECE_LENGTH, Hasher
from torrentlm.swarm.store import Store, root_of

BYTES_PER_S = 1 << 20
"""A few thousandths of what a core can hash: a node that has nothing to do takes a hundredth of one, all in all."""
AGAIN_AFTER_S = 7 * 24 * 3600.0
LOOK_EVERY_S = 60.0
_CHUNK = 1 << 20


async def check_slowly(
    store: Store,
    damaged: Callable[[str], Awaitable[None]],
    *,
    rate: float = BYTES_PER_S,
    look_every: float = LOOK_EVERY_S,
) -> None:
    """Hash every complete file once, then again every week, until cancelled; ``damaged`` gets the names of bad ones.

    ``rate`` in bytes per second.
    """
    checked: dict[str, float] = {}
    while True:
        due = _next_due({name: _modified(store.path(name)) for name in store.held()}, checked, trio.current_time())
        if due is None:
            await trio.sleep(look_every)
            continue
        good = await _matches(store.path(due), root_of(due), rate)
        checked[due] = trio.current_time()
        # It may have been evicted or changed meanwhile; then somebody else takes care of it.
        if not good and store.holds(due):
            await damaged(due)


def _next_due(held: Mapping[str, float], checked: dict[str, float], now: float) -> str | None:
    """Of the ``held`` files (name: when it was written) the one that was not checked for the longest time.

    Of those that were never checked the youngest: a power cut hurts what was written last. None if none is due.
    """
    for name in checked.keys() - held.keys():
        del checked[name]
    if new := held.keys() - checked.keys():
        return max(new, key=lambda name: (held[name], name))
    oldest = min(checked, key=lambda name: checked[name], default=None)
    return oldest if oldest is not None and now - checked[oldest] >= AGAIN_AFTER_S else None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


async def _matches(path: Path, root: str, rate: float) -> bool:
    hasher = Hasher(MAX_PIECE_LENGTH)
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb", buffering=0) as file:

            def hash_some() -> int:
                count = file.readinto(buffer)
                hasher.update_v2(buffer[:count])
                return count

            while count := await trio.to_thread.run_sync(hash_some):  # noqa: ASYNC110
                await trio.sleep(count / rate)
    except OSError:
        return False  # what cannot be read is as good as altered
    return hasher.finish().root.hex() == root
