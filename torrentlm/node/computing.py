"""The part of a node that computes: its devices, each a lane with a holder of its own, and how blocks get into them.

A span is divided into consecutive parts, one per lane, in proportion to their budgets. To other nodes each is a hop of
its own, under a handle of its own, so a step goes from lane to lane as it goes from node to node.

Importing this imports torch and transformers, which takes seconds; nodes that only seed or chat never do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from torrentlm.compute.costs import PrecisionCost
from torrentlm.compute.device import Device
from torrentlm.compute.devices import choose, find_devices, whole
from torrentlm.compute.measure import measured, tried
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.holder.adapters import Adapters
from torrentlm.holder.model import HeldModel
from torrentlm.holder.service import Outbox
from torrentlm.manifest.manifest import Manifest
from torrentlm.node.lane import Lane, Share
from torrentlm.node.membership import Membership
from torrentlm.node.memory import offloadable, weights_bytes
from torrentlm.node.parts import Say
from torrentlm.records import MAX_LANES, NodeKey, Span, spans_of
from torrentlm.records import Lane as LaneRecord
from torrentlm.route.assign import Files, beyond, divide, fits
from torrentlm.wire.messages import Close, Encoded, Fail, Generate, Halt, Message, Open, Renew, Step

MAX_PRECISION = 16
"""Characters of a record's ``precision``."""


@dataclass(eq=False)
class Served:
    """A model that this node serves blocks of: ``shares`` of it, in the blocks' order, each on a lane."""

    membership: Membership
    span: Span
    shares: tuple[Share, ...]

    @property
    def arrived(self) -> frozenset[int]:
        """The blocks whose files were here when they were last looked for."""
        return frozenset().union(*(share.model.arrived for share in self.shares))


class Computing:
    """The devices and who uses them. ``changed`` is called whenever a session opens or ends."""

    def __init__(
        self,
        key: NodeKey,
        config: NodeConfig,
        devices: Sequence[Device],
        outbox: Outbox,
        changed: Callable[[], None],
        adapters: Adapters,
        say: Say,
    ) -> None:
        self.lanes = tuple(
            Lane(key, config, device, outbox, adapters, self._session_changed, self._tell_all, say)
            for device in devices[:MAX_LANES]
        )
        self._served: dict[bytes, Served] = {}
        self._config = config
        self._changed = changed
        self._say = say

    @property
    def sessions(self) -> int:
        """Sessions of all lanes; one whose route has several hops here counts for each."""
        return sum(lane.holder.sessions for lane in self.lanes)

    @property
    def accelerates(self) -> bool:
        """Whether any device is more than the processor."""
        return any(lane.device.accelerates for lane in self.lanes)

    @property
    def weights_budget(self) -> int:
        """Bytes for weights, on all devices together."""
        return sum(lane.memory.budget for lane in self.lanes)

    @property
    def offload_budgets(self) -> tuple[int, ...]:
        """Bytes of the processor's memory for blocks that each of the devices has no room for."""
        return tuple(lane.aside.budget for lane in self.lanes)

    def holds(self, name: str) -> bool:
        """Whether the block file of this name is in any device's memory, or offloaded."""
        return any(name == key for lane in self.lanes for key, _ in (*lane.memory.keys, *lane.aside.keys))

    def relieve(self) -> bool:
        """Let go of everything that nobody uses, on every device; False if there was nothing."""
        relieved = [memory.relieve() for lane in self.lanes for memory in (lane.memory, lane.aside)]
        return any(relieved)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every session ends with it."""
        async with trio.open_nursery() as nursery:
            for lane in self.lanes:
                await nursery.start(lane.run)
            task_status.started()

    # -- messages

    async def handle(self, sender: NodeKey, message: Message) -> None:
        """Take one message of ``sender``, an authenticated peer or this node itself.

        An Open goes to the lane that runs its blocks, what follows to the lane where that session is open; what may be
        about sessions of several lanes to each.
        """
        match message:
            case Renew() | Fail():
                for lane in self.lanes:
                    await lane.holder.handle(sender, message)
            case Open() | Step() | Generate() | Encoded() | Halt() | Close():
                await self._lane_for(message).holder.handle(sender, message)
            case _:
                pass

    def _lane_for(self, message: Open | Step | Generate | Encoded | Halt | Close) -> Lane:
        """The lane that answers, if only with a refusal: the one that knows the handle refuses to open it again."""
        for lane in self.lanes:
            if lane.holder.knows(message.session):
                return lane
        if isinstance(message, Open) and (served := self._served.get(message.model)):
            shares = served.shares
            return next((share for share in shares if message.first in share.model.span), shares[0]).lane
        return self.lanes[0]

    # -- blocks

    async def costs(self, measure: bool) -> Mapping[str, PrecisionCost]:
        """Which precisions all devices have: tried now, their rates measured if ``measure`` (3 s, then remembered)."""
        found: dict[str, PrecisionCost] = {}
        for device in {lane.device.torch_device: lane.device for lane in self.lanes}.values():
            for precision, cost in (await self._costs_of(device, measure)).items():
                if cost.lacking or precision not in found:
                    found[precision] = cost
        return found

    async def _costs_of(self, device: Device, measure: bool) -> Mapping[str, PrecisionCost]:
        if not measure:
            return await device.run(tried, device.torch_device)
        [info] = choose([whole(device.label)], await trio.to_thread.run_sync(find_devices))
        # What cannot be remembered is measured again; nobody need hear of it here.
        [found] = await device.run(measured, [info], self._config.data, lambda sentence: None)
        return {cost.precision: cost for cost in found.precisions}

    async def open(self, membership: Membership, span: Span) -> Served:
        """Get ready to serve ``span``, none of whose blocks need be here yet.

        Raises ArtifactError, UnsupportedModelError, StorageError.
        """
        manifest = membership.manifest
        how = membership.precisions
        in_memory = weights_bytes(manifest, how.compute, how.stored)
        shares: list[Share] = []
        for lane, part in self._divided(manifest, in_memory, span):
            aside = lane.set_aside(manifest, in_memory, part)
            model = await trio.to_thread.run_sync(
                HeldModel,
                membership.id,
                manifest,
                membership.folder,
                membership.files.paths(part),
                part,
                how.compute,
                lane.device.torch_device,
                self._config.allow_code,
                in_memory,
                (),
                how.stored,
                self._config.data / "quantized",
                shares[0].model if shares else None,
                aside,
            )
            shares.append(Share(lane, model))
        served = self._served[membership.id] = Served(membership, span, tuple(shares))
        return served

    def fitting(self, membership: Membership, span: Span) -> Span:
        """As much of ``span``, from its front, as the devices have room for in consecutive parts: what they could hold
        together need not be divisible so.

        A span that the operator names stays as it is. Raises ConfigError if it does not fit budgets that the operator
        names, too.
        """
        config = self._config
        how = membership.precisions
        in_memory = weights_bytes(membership.manifest, how.compute, how.stored)
        manifest = membership.manifest
        if config.blocks == "auto":
            while len(span) > 1 and not self._fits(manifest, in_memory, span):
                span = Span(span.first, span.last - 1)
        elif (config.ram or config.vram) is not None and not self._fits(manifest, in_memory, span):
            devices = " and ".join(f"{lane.memory.budget / 1e6:,.1f} MB on {lane.device.label}" for lane in self.lanes)
            name = "vram" if self.accelerates else "ram"
            if aside := sum(self.offload_budgets):
                devices += f", with {aside / 1e6:,.1f} MB of RAM to offload to"
            raise ConfigError(
                f"--blocks {span} cannot be divided into consecutive parts that fit the memory for weights, {devices}:"
                f" raise --{name} or name fewer blocks"
            )
        return span

    def _fits(self, manifest: Manifest, in_memory: Mapping[str, int], span: Span) -> bool:
        """Whether every lane has room for its part, offloading what it may."""
        if fits(_sizes(manifest, in_memory, span), [lane.memory.budget for lane in self.lanes]):
            return True
        divided = self._divided(manifest, in_memory, span)
        return all(lane.set_aside(manifest, in_memory, part) is not None for lane, part in divided)

    def _divided(self, manifest: Manifest, in_memory: Mapping[str, int], span: Span) -> list[tuple[Lane, Span]]:
        """Each lane's part of the span, of those that get one. The processor helps out only where accelerators that
        the operator named beside it have too little memory, and nothing is offloaded where it need not be."""
        lanes, sizes = self.lanes, _sizes(manifest, in_memory, span)
        helping = [at for at, lane in enumerate(lanes) if self.accelerates and not lane.device.accelerates]
        budgets = [lane.memory.budget for lane in lanes]
        if any(self.offload_budgets) and not fits(sizes, budgets):
            slab = max(offloadable(manifest, in_memory, span).values(), default=0)
            budgets = [beyond(lane.memory.budget, lane.aside.budget, slab) for lane in lanes]
        parts = divide(sizes, budgets, helping)
        return [
            (lane, Span(span.first + part.start, span.first + part.stop - 1))
            for lane, part in zip(lanes, parts, strict=True)
            if part
        ]

    async def add(self, served: Served, blocks: Sequence[int]) -> None:
        """Serve these blocks, whose files are here: in memory if there is room, from the disk when asked for if not.

        The first ones of a model are compared with what was recorded. Raises ArtifactError, UnsupportedModelError,
        StorageError, RefusedError.
        """
        for share in served.shares:
            if own := [block for block in blocks if block in share.model.span]:
                await share.lane.add(share, own, served.membership.sidecars)
                self._tell(served)

    async def settle(self, served: Served) -> None:
        """All blocks are here: build what runs them before somebody waits for it, where they are in memory."""
        for share in served.shares:
            await share.lane.settle(share)
        # What was loaded stays: the collector need not walk through it again and again between tokens.
        gc.collect()
        gc.freeze()

    async def warn_of_overflow(self, served: Served) -> None:
        """Say which blocks F16 cannot hold, by a recorded sample, where the operator has it computed in all the same.

        Advice, as the sample is. Raises StorageError.
        """
        membership = served.membership
        if membership.precisions.compute != "F16" or membership.manifest.dtype == "F16" or not self._config.recheck:
            return
        if (found := await membership.sidecars.find()) is None:
            return
        blocks: list[int] = []
        for share in served.shares:
            blocks += await trio.to_thread.run_sync(share.model.overflowing, found.sidecar)
        if blocks:
            listed = ", ".join(map(str, spans_of(blocks)))
            why = f"F16 may not hold what blocks {listed} compute; another --precision does"
            self._say({"event": "precision", "precision": membership.precisions.said(served.span), "why": why})

    # -- what peers are told

    def _session_changed(self) -> None:
        self._changed()
        if any(served.membership.peers.record.lanes for served in self._served.values()):  # they tell sessions, too
            self._tell_all()

    def _tell_all(self) -> None:
        for served in self._served.values():
            if any(share.open for share in served.shares):  # before, there is nothing to tell
                self._tell(served)

    def _tell(self, served: Served) -> None:
        shares = served.shares
        kept = dict.fromkeys(form for share in shares for form in share.model.precision.split("+"))
        served.membership.peers.publish(
            resident=spans_of(block for share in shares for block in share.resident),
            offered=spans_of(block for share in shares for block in share.offered),
            claimed=spans_of(block for share in shares for block in share.claimed),
            precision="+".join(kept)[:MAX_PRECISION],
            device=shares[0].lane.device_name,
            adapters=self._config.adapters,
            lanes=_lanes(shares),
        )


def _lanes(shares: Sequence[Share]) -> tuple[LaneRecord, ...]:
    """What a record says of the devices; nothing where there is one that has all of its blocks in its memory."""
    if len(shares) == 1 and not shares[0].model.offloading.blocks:
        return ()
    most = MAX_LANES // len(shares)
    return tuple(record for number, share in enumerate(shares) for record in share.records(number, most))


def _sizes(manifest: Manifest, in_memory: Mapping[str, int], span: Span) -> list[Files]:
    """The bytes in memory of each block's files."""
    return [{file.name: in_memory[file.name] for file in manifest.block_files(block)} for block in span]
