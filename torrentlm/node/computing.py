"""The part of a node that computes: its device, its holder, and how blocks get into them.

Importing this imports torch and transformers, which takes seconds; nodes that only seed or chat never do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from torrentlm.compute.costs import PrecisionCost
from torrentlm.compute.device import Device
from torrentlm.compute.measure import tried
from torrentlm.config import NodeConfig
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.memory import Memory
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Holder, Outbox
from torrentlm.node.membership import Membership
from torrentlm.node.memory import weights_bytes, weights_share
from torrentlm.node.parts import Say
from torrentlm.node.recheck import recheck
from torrentlm.records import NodeKey, Span, spans_of

MAX_DEVICE_NAME = 40


@dataclass(eq=False)
class Served:
    """A model that this node serves blocks of; ``open`` once the first may be asked for."""

    membership: Membership
    model: HeldModel
    open: bool = False
    rechecked: bool = False


class Computing:
    """One device and the holder that uses it. ``changed`` is called whenever a session opens or ends."""

    def __init__(
        self,
        key: NodeKey,
        config: NodeConfig,
        device: Device,
        outbox: Outbox,
        changed: Callable[[], None],
        adapters: Adapters,
        say: Say,
    ) -> None:
        self.device = device
        memory = Memory(weights_share(device.budget), free=device.free_memory)
        self.holder = Holder(
            key,
            outbox,
            self.device,
            memory,
            kv_budget=device.budget - memory.budget,
            max_lease=config.lease,
            adapters=adapters if config.adapters else None,
            changed=changed,
        )
        memory.changed = self._changed
        self._served: dict[bytes, Served] = {}
        self._config = config
        self._say = say

    async def costs(self) -> Mapping[str, PrecisionCost]:
        """Which precisions the device has, tried now; their rates are not measured."""
        return await self.device.run(tried, self.device.torch_device)

    async def open(self, membership: Membership, span: Span) -> Served:
        """Get ready to serve ``span``, none of whose blocks need be here yet.

        Raises ArtifactError, UnsupportedModelError, StorageError.
        """
        how = membership.precisions
        model = await trio.to_thread.run_sync(
            HeldModel,
            membership.id,
            membership.manifest,
            membership.folder,
            membership.files.paths(span),
            span,
            how.compute,
            self.device.torch_device,
            self._config.allow_code,
            weights_bytes(membership.manifest, how.compute, how.stored),
            (),
            how.stored,
            self._config.data / "quantized",
        )
        served = self._served[membership.id] = Served(membership, model)
        return served

    async def add(self, served: Served, blocks: Sequence[int]) -> None:
        """Serve these blocks, whose files are here: in memory if there is room, from the disk when asked for if not.

        The first ones of a model are compared with what was recorded. Raises ArtifactError, UnsupportedModelError,
        StorageError, RefusedError.
        """
        for block in blocks:
            served.model.arrive(block)
            await self.holder.memory.preload(served.model.units(Span(block, block)))
        if self._config.recheck and not served.rechecked:
            await self._recheck(served, blocks)
        if not served.open:
            served.open = True
            self.holder.hold(served.model)
        self._tell(served)

    async def _recheck(self, served: Served, blocks: Sequence[int]) -> None:
        """Only a layer's block makes another check superfluous."""
        tried = served.model.worth_checking(blocks)
        served.rechecked = served.membership.manifest.blocks[tried[0]].kind == "layers"
        units = [unit for block in tried for unit in served.model.units(Span(block, block))]
        if sum(unit.bytes for unit in units) > self.holder.memory.budget:
            tried, units = tried[:1], served.model.units(Span(tried[0], tried[0]))
        pin = await self.holder.memory.pin(units)
        try:
            await recheck(served.model, tried, served.membership.sidecars, self._say)
        finally:
            pin.release()

    async def settle(self, served: Served) -> None:
        """All blocks are here: build what runs the whole span before somebody waits for it, if it is in memory."""
        units = served.model.units(served.model.span)
        if all(unit.key in self.holder.memory.keys for unit in units):
            pin = await self.holder.memory.pin(units)
            try:
                await trio.to_thread.run_sync(served.model.warm_up)
            finally:
                pin.release()
        # What was loaded stays: the collector need not walk through it again and again between tokens.
        gc.collect()
        gc.freeze()

    async def warn_of_overflow(self, served: Served) -> None:
        """Say which blocks F16 cannot hold, by a recorded sample, where the operator has it computed in all the same.

        Advice, as the sample is. Raises StorageError.
        """
        model, sidecars = served.model, served.membership.sidecars
        if model.precisions.compute != "F16" or model.manifest.dtype == "F16" or not self._config.recheck:
            return
        if (found := await sidecars.find()) is None:
            return
        if blocks := await trio.to_thread.run_sync(model.overflowing, found.sidecar):
            listed = ", ".join(map(str, spans_of(blocks)))
            why = f"F16 may not hold what blocks {listed} compute; another --precision does"
            self._say({"event": "precision", "precision": model.precision, "why": why})

    def _changed(self) -> None:
        for served in self._served.values():
            if served.open:
                self._tell(served)

    def _tell(self, served: Served) -> None:
        resident = served.model.blocks_of(self.holder.memory.keys)
        served.membership.peers.publish(
            resident=spans_of(resident),
            offered=spans_of(served.model.arrived),
            claimed=spans_of(set(served.model.span) - set(served.model.arrived)),
            precision=served.model.precision,
            device=self.device.name[:MAX_DEVICE_NAME],
            adapters=self._config.adapters,
        )
