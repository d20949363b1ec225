"""One device of a node with all that is its own: a memory, a holder, and of each model a part of the node's span."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import trio

from torrentlm.compute.device import Device
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.memory import Memory
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Holder, Outbox
from torrentlm.node.memory import weights_share
from torrentlm.node.parts import Say
from torrentlm.node.recheck import recheck
from torrentlm.node.sidecars import Sidecars
from torrentlm.records import Lane as LaneRecord
from torrentlm.records import NodeKey, Span

MAX_DEVICE_NAME = 40


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
        """The blocks that are in the device's memory, and can be asked for."""
        return self.model.blocks_of(self.lane.memory.keys) if self.offered else []

    @property
    def claimed(self) -> Collection[int]:
        """The blocks that are still to come."""
        return () if self.lane.lost else set(self.model.span) - set(self.offered)

    def record(self) -> LaneRecord:
        """What peers are told of it."""
        lane, model = self.lane, self.model
        return LaneRecord(model.span, lane.device_name, model.precision, sessions=lane.holder.sessions)


class Lane:
    """A budget, an order of forwards and sessions of its own: what runs on one device waits for no other.

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
        self.holder = Holder(
            key,
            outbox,
            device,
            self.memory,
            kv_budget=device.budget - self.memory.budget,
            max_lease=config.lease,
            adapters=adapters if config.adapters else None,
            changed=session_changed,
            faulty=self._doubt,
        )
        self.memory.changed = memory_changed
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

    async def add(self, share: Share, blocks: Sequence[int], sidecars: Sidecars) -> None:
        """Serve these blocks of the share: in memory if there is room, from the disk when asked for if not.

        The first ones are compared with what was recorded. Raises ArtifactError, UnsupportedModelError, StorageError,
        RefusedError.
        """
        for block in blocks:
            share.model.arrive(block)
            await self.memory.preload(share.model.units(Span(block, block)))
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
        pin = await self.memory.pin(units)
        try:
            await recheck(model, tried, sidecars, self._say)
        finally:
            pin.release()

    async def settle(self, share: Share) -> None:
        """All blocks are here: build what runs all of them before somebody waits for it, if they are in memory."""
        units = share.model.units(share.model.span)
        if all(unit.key in self.memory.keys for unit in units):
            pin = await self.memory.pin(units)
            try:
                await trio.to_thread.run_sync(share.model.warm_up)
            finally:
                pin.release()
