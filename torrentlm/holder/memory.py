"""One device's memory: the block files in it, under a hard budget, and who needs them now.

Sessions pin the files of their span; what nobody has pinned goes when room is needed, the least recently used first.
The decisions are holder/residency.py's; this owns the state and carries them out, one at a time and in the order in
which they were asked for, so that nobody waits for ever.

Other programs take memory, too. Where the device has less than ``RESERVE`` left, the budget shrinks to what is there;
and when an allocation fails, everything unpinned goes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import trio

from torrentlm.errors import OutOfMemoryError, RefusedError
from torrentlm.holder.residency import Plan, Resident, Shortage, plan, shrink

log = logging.getLogger(__name__)

RESERVE = 256 << 20
"""Bytes of a device's memory that are left to others, or a sixteenth of what it has, if that is less."""
WATCH_EVERY_S = 2.0
WAIT_S = 10.0
"""How long somebody waits for others to end who have the room that it takes."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A block file as it is held: its ``name``, the ``precision`` it is held in, and the bytes that it takes so.

    ``load`` brings it in and returns what keeps it there. It blocks; it is called in a worker thread. Raises
    ArtifactError, StorageError, OutOfMemoryError.
    """

    name: str
    precision: str
    bytes: int
    load: Callable[[], Any]

    @property
    def key(self) -> UnitKey:
        return self.name, self.precision


UnitKey = tuple[str, str]
"""The name of a block file, which is its content, and the precision."""


class Memory:
    """``budget``: bytes of weights. ``free`` tells how many bytes the device could still give to anybody; ``evicted``
    is called with the keys of what is about to go, whose owners then let go of it, ``changed`` whenever something has
    come or gone.
    """

    def __init__(
        self,
        budget: int,
        *,
        free: Callable[[], int],
        reserve: int = RESERVE,
        evicted: Callable[[Collection[UnitKey]], None] = lambda keys: None,
    ) -> None:
        self.budget = budget
        self.evicted = evicted
        self.changed: Callable[[], None] = lambda: None
        self._free = free
        self._reserve = reserve
        self._loaded: OrderedDict[UnitKey, Any] = OrderedDict()
        self._residents: dict[UnitKey, Resident] = {}
        self._turn = trio.Lock()  # first come, first served
        self._released = trio.Event()

    @property
    def keys(self) -> Collection[UnitKey]:
        """What is in memory."""
        return self._residents.keys()

    @property
    def used(self) -> int:
        """Bytes of all that is in memory."""
        return sum(resident.bytes for resident in self._residents.values())

    @property
    def pinned(self) -> int:
        """Bytes of what may not go."""
        return sum(resident.bytes for resident in self._residents.values() if resident.pins)

    @property
    def allowed(self) -> int:
        """The budget, or less where other programs have taken what it counts on."""
        return min(self.budget, max(0, self.used + self._free() - self._reserve))

    async def pin(self, units: Sequence[Unit], *, wait_s: float = WAIT_S) -> Pin:
        """Have ``units`` in memory until the pin is released.

        Waits up to ``wait_s`` seconds for its turn and for others to release what is in the way. Raises RefusedError
        ("memory") if that is not enough, or never could be, and what loading raises.
        """
        wanted = {unit.key: unit for unit in units}
        shortage: Shortage | None = None
        with trio.move_on_after(wait_s) as waiting:
            async with self._turn:
                while isinstance(found := self._plan(wanted.values()), Shortage):
                    shortage = found
                    if found.hopeless:
                        break
                    await self._released.wait()
                else:
                    waiting.deadline = float("inf")
                    return await self._carry_out(found, wanted)
        raise RefusedError(_too_little(shortage), "memory" if shortage else "busy")

    async def preload(self, units: Sequence[Unit]) -> bool:
        """Have ``units`` in memory if that needs nobody to go; False if it does. Raises what loading raises."""
        wanted = {unit.key: unit for unit in units}
        async with self._turn:
            found = self._plan(wanted.values())
            if isinstance(found, Shortage) or found.evictions:
                return False
            (await self._carry_out(found, wanted)).release()
        return True

    def relieve(self) -> bool:
        """Let go of everything that nobody uses; False if there was nothing."""
        return self._evict(shrink(self._residents, self.used))

    async def watch(self) -> None:
        """Give back what other programs need, until cancelled."""
        while True:
            await trio.sleep(WATCH_EVERY_S)
            if (surplus := self.used - self.allowed) > 0 and self._evict(shrink(self._residents, surplus)):
                log.warning("memory is short: %.0f MB of weights were let go of", surplus / 1e6)

    def _plan(self, units: Collection[Unit]) -> Plan[UnitKey] | Shortage:
        return plan(self._residents, {unit.key: unit.bytes for unit in units}, self.allowed)

    async def _carry_out(self, found: Plan[UnitKey], wanted: dict[UnitKey, Unit]) -> Pin:
        self._evict(found.evictions)
        here = [key for key in wanted if key in self._residents]
        for key in here:
            self._touch(key, 1)
        pin = Pin(self, here)
        try:
            for key in found.loads:
                await self._load(wanted[key])
                pin.keys.append(key)
        except BaseException:
            pin.release()
            raise
        return pin

    async def _load(self, unit: Unit) -> None:
        """Pinned and accounted for before it is there, and no more once that failed."""
        self._residents[unit.key] = Resident(unit.bytes, pins=1)
        try:
            try:
                loaded = await trio.to_thread.run_sync(unit.load)
            except OutOfMemoryError:
                if not self.relieve():
                    raise
                loaded = await trio.to_thread.run_sync(unit.load)
        except BaseException:
            del self._residents[unit.key]
            raise
        self._loaded[unit.key] = loaded
        self.changed()

    def _touch(self, key: UnitKey, pins: int) -> None:
        """Now the most recently used; ``pins`` more of them."""
        resident = self._residents.pop(key)
        self._residents[key] = replace(resident, pins=resident.pins + pins)

    def _evict(self, keys: Collection[UnitKey]) -> bool:
        if keys:
            self.evicted(keys)
            for key in keys:
                del self._residents[key], self._loaded[key]
            self.changed()
        return bool(keys)

    def release(self, keys: Collection[UnitKey]) -> None:
        for key in keys:
            self._touch(key, -1)
        self._released.set()
        self._released = trio.Event()


class Pin:
    """Keeps the files ``keys`` in memory until it is released, once."""

    def __init__(self, memory: Memory, keys: list[UnitKey]) -> None:
        self.keys = keys
        self._memory = memory

    def release(self) -> None:
        keys, self.keys = self.keys, []
        if keys:
            self._memory.release(keys)


class Pins:
    """Several pins as one."""

    def __init__(self) -> None:
        self._pins: list[Pin] = []

    def add(self, pin: Pin) -> None:
        self._pins.append(pin)

    def release(self) -> None:
        for pin in self._pins:
            pin.release()


async def pin_all(*wanted: tuple[Memory, Sequence[Unit]]) -> Pins:
    """Have the units of each of several memories there, one memory after the other. Raises as ``Memory.pin``."""
    pins = Pins()
    try:
        for memory, units in wanted:
            if units:
                pins.add(await memory.pin(units))
    except BaseException:
        pins.release()
        raise
    return pins


def _too_little(shortage: Shortage | None) -> str:
    if shortage is None:
        return "this holder is busy loading blocks for others: try again later"
    wanted, budget = f"{shortage.wanted / 1e6:,.1f} MB", f"{shortage.budget / 1e6:,.1f} MB"
    if shortage.hopeless:
        return f"these blocks need {wanted} of memory, and this holder has {budget} for weights: ask it for fewer"
    free = max(0, shortage.budget - shortage.pinned)
    return (
        f"these blocks need {wanted} of memory, and {free / 1e6:,.1f} MB of this holder's {budget} are not in use by"
        " other sessions: try again later, or ask another holder"
    )
