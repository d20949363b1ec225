"""Fetching before anybody asks: carries out ``route.prefetch.plan``, one block at a time, in the background.

::

    Open ─▶ saw ─▶ Requests ──┐
    records of peers, disk ───┴─▶ plan ─▶ evict what is worth less ─▶ BlockFiles.fetch(…, Urgency.BACKGROUND)

What was prefetched is remembered in ``<data>/prefetched.json`` until somebody pins it: from then on it is a block file
like any other, and takes nothing of this budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

import trio

from torrentlm.errors import TorrentLMError
from torrentlm.manifest.manifest import FileEntry
from torrentlm.node.membership import Membership
from torrentlm.node.parts import Parts
from torrentlm.records import Span
from torrentlm.route.prefetch import Fetch, Limits, View, copies_of_others, in_use, plan
from torrentlm.route.requests import Requests
from torrentlm.structured import single_error
from torrentlm.swarm.disk_cache import Kept
from torrentlm.swarm.files import read_json, storage_errors, write_atomically
from torrentlm.swarm.transfer import Urgency

START_AFTER_S = 30.0
"""A node that has just begun has better things to do, and does not know yet what others have."""
PLAN_EVERY_S = 15.0
MEASURE_EVERY_S = 1.0
SHARE = 4
"""One part in so many of the fastest rate seen, and of the disk that is left, is for prefetching."""
LEAST_RATE = 250_000
"""Bytes per second that prefetching may take in any case: what little was fetched so far says little of the link."""
STALL_S = 120.0
"""A block of which nothing has come for so long gives way to the next one."""
SET_ASIDE_S = 600.0
"""For so long it is not tried again, nor is one that failed."""


class Prefetcher:
    """One per node; ``run`` is a service. ``memberships`` are the node's, by the model's v2 info-hash."""

    def __init__(self, parts: Parts, memberships: Mapping[bytes, Membership]) -> None:
        self._parts = parts
        self._memberships = memberships
        self._requests = Requests()
        self._fastest = 0
        self._path = parts.store.data / "prefetched.json"
        names = read_json(self._path)
        self._names: set[str] = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        self._aside: dict[str, float] = {}
        self._woken = trio.Event()

    def saw(self, model: bytes, span: Span, now: float) -> None:
        """A session asked this node for ``span``; of models that it takes no part in nothing is remembered."""
        membership = self._memberships.get(model)
        if membership is not None and membership.ready and span.last < len(membership.manifest.blocks):
            self._requests.saw(model, span, now)
            self._woken.set()

    @property
    def bytes(self) -> int:
        """What prefetched blocks take of the disk."""
        with storage_errors(self._path):
            return sum(file.taken for file in self._prefetched(self._parts.shelf.space.kept()).values())

    async def run(self) -> None:
        """Fetch what the plan says, until cancelled. Nothing that goes wrong here is more than a block not fetched."""
        if self._parts.config.prefetch == 0:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            await trio.sleep(START_AFTER_S)
            while True:
                try:
                    with single_error():
                        fetched = await self._fetch_next()
                except TorrentLMError:
                    fetched = False
                if not fetched:
                    with trio.move_on_after(PLAN_EVERY_S):
                        await self._woken.wait()
                    self._woken = trio.Event()

    async def _measure(self) -> None:
        while True:
            rate = sum(transfer.progress.download_rate for transfer in self._parts.swarm.transfers)
            self._fastest = max(self._fastest, rate)
            self._parts.swarm.background_rate = self.rate
            await trio.sleep(MEASURE_EVERY_S)

    @property
    def rate(self) -> int:
        """Bytes per second that prefetching may download."""
        configured = self._parts.config.prefetch_rate
        return configured if configured is not None else max(LEAST_RATE, self._fastest // SHARE)

    # -- deciding

    def _plan(self) -> list[Fetch]:
        now = trio.current_time()
        space = self._parts.shelf.space
        with storage_errors(self._path):
            kept = space.kept()
        prefetched = self._prefetched(kept)
        taken = sum(file.taken for file in prefetched.values())
        free = space.room(besides=kept)  # without evicting anything
        budget = self._parts.config.prefetch
        budget = (free + taken) // SHARE if budget is None else budget
        here = {name for name in kept if self._parts.store.holds(name)}
        views = {model: self._view(each) for model, each in self._memberships.items() if each.ready and each.holds}
        space.used(in_use(views, self._requests, here, now))
        self._aside = {name: until for name, until in self._aside.items() if until > now}
        here |= space.promised | self._aside.keys()
        oldest = sorted(prefetched, key=lambda name: prefetched[name].used)
        limits = Limits(min(free, budget - taken), self.rate)
        return plan(views, self._requests, here, oldest, limits, now)

    def _view(self, membership: Membership) -> View:
        manifest = membership.manifest
        blocks = range(len(manifest.blocks))
        return View(
            files=[{file.name: file.size for file in manifest.block_files(block)} for block in blocks],
            spans=membership.peers.record.resident,
            copies=copies_of_others(membership.snapshot(), len(blocks)),
            first=int.from_bytes(self._parts.key[:8], "big") % len(blocks),
        )

    def _prefetched(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """What of the files on disk is there by prefetching alone."""
        return {name: file for name, file in kept.items() if name in self._names and not file.pinned}

    # -- fetching

    async def _fetch_next(self) -> bool:
        """Whether a block came. Raises TorrentLMError."""
        fetches = self._plan()
        if not fetches:
            return False
        first = fetches[0]
        membership = self._memberships[first.model]
        files = [file for file in membership.manifest.block_files(first.block) if file.name in first.files]
        await self._parts.shelf.evict(first.displaces)
        self._remember(self._names - set(first.displaces) | set(first.files))
        aside = frozenset(first.files)  # unless they come
        self._aside |= dict.fromkeys(aside, trio.current_time() + SET_ASIDE_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, membership, files, nursery.cancel_scope)
            await membership.files.fetch(files, urgency=Urgency.BACKGROUND)
            for name in aside:
                self._aside.pop(name, None)
            nursery.cancel_scope.cancel()
        return not aside.intersection(self._aside)

    async def _watch(self, membership: Membership, files: Sequence[FileEntry], scope: trio.CancelScope) -> None:
        """Cancel ``scope`` when nothing comes, though nothing keeps it from coming."""
        done, moved = -1, trio.current_time()
        while trio.current_time() - moved < STALL_S:
            loading = membership.files.loading(files)
            if loading.done != done or any(transfer.pressing for transfer in self._parts.swarm.transfers):
                done, moved = loading.done, trio.current_time()
            await trio.sleep(MEASURE_EVERY_S)
        scope.cancel()

    def _remember(self, names: set[str]) -> None:
        """Prefetched files by name, without those that somebody uses by now or that are gone."""
        space = self._parts.shelf.space
        self._names = {name for name in names if name in space.promised or not space.pinned(name)}
        with suppress(OSError):  # at worst they count as fetched for somebody
            write_atomically(self._path, json.dumps(sorted(self._names), indent=0), durable=False)
