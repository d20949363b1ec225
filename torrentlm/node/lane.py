"""One device of a node with all that is its own: a memory, a holder, and of each model a part of the node's span."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from torrentlm.compute.device import Device
from torrentlm.compute.machine import available_memory
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.memory import Memory, pin_all
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Holder, Outbox
from torrentlm.manifest.manifest import Manifest
from torrentlm.node.memory import offloadable, weights_share
from torrentlm.node.parts import Say
from torrentlm.node.recheck import recheck
from torrentlm.node.sidecars import Sidecars
from torrentlm.records import Lane as LaneRecord
from torrentlm.records import NodeKey, Span, spans_of
from torrentlm.route.assign import set_aside
from torrentlm.route.plan import UNMEASURED_BLOCK_S

MAX_DEVICE_NAME = 40
MAX_BLOCK_MS = 1e6
"""What a record can say."""
UNMEASURED_UPLOAD = 4e9
"""Bytes per second to a device, where nobody measured: less than what a slot for a GPU has."""


@dataclass(eq=False)
class Share:
    """What one lane runs of a model; ``open`` once the first block may be asked for."""

    lane: Lane
    model: HeldModel
    open: bool = False
    rechecked: bool = False

    @property
    def offered(self) -> Collection[int]:
        """The blocks that can be asked for."""
        return self.model.arrived if self.open and not self.lane.lost else ()

    @property
    def resident(self) -> list[int]:
        """The blocks that are in the device's memory, or offloaded, and can be asked for."""
        lane = self.lane
        return self.model.blocks_of({*lane.memory.keys, *lane.aside.keys}) if self.offered else []

    @property
    def claimed(self) -> Collection[int]:
        """The blocks that are still to come."""
        return () if self.lane.lost else set(self.model.span) - set(self.offered)

    def records(self, number: int, most: int) -> list[LaneRecord]:
        """What peers are told of it, in at most ``most`` parts: offloaded blocks have a time of their own.

        ``number``: which device it is.
        """
        lane, model = self.lane, self.model
        aside = set(model.offloading.blocks)
        parts = sorted((*spans_of(aside), *spans_of(set(model.span) - aside)))
        if len(parts) > most:
            parts = [model.span]
        said = LaneRecord(model.span, lane.device_name, model.precision, sessions=lane.holder.sessions, number=number)
        return [replace(said, span=part, block_ms=self._block_ms(aside.intersection(part))) for part in parts]

    def _block_ms(self, aside: Collection[int]) -> float:
        """Of the slowest of these offloaded blocks, each copied while another computes; 0 (not measured) for none.

        What computing takes is not measured, so that is what routes assume then.
        """
        largest = max((self.model.offloading.bytes_of(block) for block in aside), default=0)
        copied = largest / (self.lane.device.upload or UNMEASURED_UPLOAD)
        return min(1000 * max(UNMEASURED_BLOCK_S, copied), MAX_BLOCK_MS) if aside else 0.0


class Lane:
    """A budget, an order of forwards and sessions of its own: what runs on one device waits for no other. ``memory`` is
    the device's, ``aside`` what it may have of the processor's for blocks that are offloaded.

    ``session_changed`` is called whenever a session opens or ends, ``memory_changed`` when blocks come or go, or can be
    asked for no more. ``lost`` says why the device computes nothing any more, "" as long as it does: a driver may lose
    one, which takes its sessions and blocks with it and nothing else.
    """

    def __init__(
        self,
        key: NodeKey,
        config: NodeConfig,
        device: Device,
        outbox: Outbox,
        adapters: Adapters,
        session_changed: Callable[[], None],
        memory_changed: Callable[[], None],
        say: Say,
    ) -> None:
        self.device = device
        self.lost = ""
        self._doubted = trio.Event()
        self.memory = Memory(weights_share(device.budget), free=self._free)
        self.aside = Memory(device.offload, free=available_memory)
        self.holder = Holder(
            key,
            outbox,
            device,
            self.memory,
            kv_budget=device.budget - self.memory.budget,
            aside=self.aside,
            max_lease=config.lease,
            adapters=adapters if config.adapters else None,
            changed=session_changed,
            faulty=self._doubt,
        )
        self.memory.changed = self.aside.changed = memory_changed
        self._config = config
        self._say = say

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every session ends with it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.holder.run)
            task_status.started()
            while not self.lost:
                await self._doubted.wait()
                self._doubted = trio.Event()
                await self._check()

    def _doubt(self) -> None:
        self._doubted.set()

    async def _check(self) -> None:
        try:
            await self.device.run(self.device.check)
        except ConfigError as error:
            self.lost = str(error)
            self._say({"event": "device", "device": self.device.label, "why": self.lost})
            self.memory.changed()
            await self.holder.give_up(self.lost)

    def _free(self) -> int:
        try:
            return self.device.free_memory()
        except ConfigError:
            self._doubt()
            return 0

    @property
    def device_name(self) -> str:
        """What peers are told, at most ``MAX_DEVICE_NAME`` characters."""
        return self.device.name[:MAX_DEVICE_NAME]

    def set_aside(self, manifest: Manifest, in_memory: Mapping[str, int], span: Span) -> dict[int, int] | None:
        """Which blocks of ``span`` to offload, and what each takes then; None where it does not fit even so."""
        sizes = [{file.name: in_memory[file.name] for file in manifest.block_files(block)} for block in span]
        may = offloadable(manifest, in_memory, span) if self.aside.budget else {}
        at = {block - span.first: size for block, size in may.items()}
        found = set_aside(sizes, at, self.memory.budget, self.aside.budget)
        return None if found is None else {span.first + place: at[place] for place in found}

    async def add(self, share: Share, blocks: Sequence[int], sidecars: Sidecars) -> None:
        """Serve these blocks of the share: in memory if there is room, from the disk when asked for if not.

        The first ones are compared with what was recorded. Raises ArtifactError, UnsupportedModelError, StorageError,
        RefusedError.
        """
        for block in blocks:
            share.model.arrive(block)
            await self.memory.preload(share.model.units(Span(block, block)))
            await self.aside.preload(share.model.units_aside(Span(block, block)))
        if self._config.recheck and not share.rechecked:
            await self._recheck(share, blocks, sidecars)
        if not share.open:
            share.open = True
            self.holder.hold(share.model)

    async def _recheck(self, share: Share, blocks: Sequence[int], sidecars: Sidecars) -> None:
        """Only a layer's block makes another check superfluous."""
        model = share.model
        tried = model.worth_checking(blocks)
        share.rechecked = model.manifest.blocks[tried[0]].kind == "layers"
        units = [unit for block in tried for unit in model.units(Span(block, block))]
        if sum(unit.bytes for unit in units) > self.memory.budget:
            tried, units = tried[:1], model.units(Span(tried[0], tried[0]))
        aside = [unit for block in tried for unit in model.units_aside(Span(block, block))]
        pin = await pin_all((self.memory, units), (self.aside, aside))
        try:
            await recheck(model, tried, sidecars, self._say)
        finally:
            pin.release()

    async def settle(self, share: Share) -> None:
        """All blocks are here: build what runs all of them before somebody waits for it, if they are in memory."""
        units, aside = share.model.units(share.model.span), share.model.units_aside(share.model.span)
        keys = {*self.memory.keys, *self.aside.keys}
        if all(unit.key in keys for unit in (*units, *aside)):
            pin = await pin_all((self.memory, units), (self.aside, aside))
            try:
                await trio.to_thread.run_sync(share.model.warm_up)
            finally:
                pin.release()
