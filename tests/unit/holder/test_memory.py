"""The owner of a device's memory: who waits for whom, what a failed load leaves behind, what happens when memory is
short."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import wraps

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from trio.testing import MockClock

from torrentlm.errors import ArtifactError, OutOfMemoryError, RefusedError
from torrentlm.holder import memory as module
from torrentlm.holder.memory import Memory, Pin, Unit, UnitKey

PLENTY = 1 << 40


def in_trio(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs a test in trio, on a clock that jumps over what is only waited for."""

    @wraps(test)
    def run() -> None:
        trio.run(test, clock=MockClock(autojump_threshold=0.2))  # what threads do is not only waited for

    return run


def unit(name: str, size: int, load: Callable[[], object] = object) -> Unit:
    return Unit(name, "F32", size, load)


class Device:
    """What would be allocated on a device, counted at every moment."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.highest = 0
        self.loads: list[str] = []

    def unit(self, name: str, size: int) -> Unit:
        def load() -> Held:
            self.loads.append(name)
            self.used += size
            self.highest = max(self.highest, self.used)
            return Held(self, size)

        return unit(name, size, load)


class Held:
    """Frees its bytes when nobody holds on to it any more, as a tensor does."""

    def __init__(self, device: Device, size: int) -> None:
        self.device = device
        self.size = size

    def __del__(self) -> None:
        self.device.used -= self.size


@in_trio
async def test_what_is_evicted_is_gone_before_the_next_is_there() -> None:
    device = Device(10)
    memory = Memory(10, free=lambda: PLENTY)
    for name in "abcabc":
        (await memory.pin([device.unit(name, 6)])).release()
        assert device.used == memory.used == 6
    assert device.highest == 6
    assert device.loads == list("abcabc")


@in_trio
async def test_those_who_wait_are_served_in_their_order() -> None:
    memory = Memory(10, free=lambda: PLENTY)
    first = await memory.pin([unit("a", 6)])
    done = []

    async def one(name: str, size: int) -> None:
        pin = await memory.pin([unit(name, size)])
        done.append(name)
        await trio.sleep(1)
        pin.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "large", 9)
        await trio.sleep(0.1)
        nursery.start_soon(one, "small", 2)  # would fit beside the first, but is not let by
        await trio.sleep(0.1)
        assert done == []
        first.release()
    assert done == ["large", "small"]


@in_trio
async def test_a_wait_has_an_end_and_a_sentence() -> None:
    memory = Memory(10_000_000, free=lambda: PLENTY)
    pin = await memory.pin([unit("a", 6_000_000)])
    with pytest.raises(RefusedError, match=r"need 5\.0 MB of memory, and 4\.0 MB of this holder's 10\.0 MB") as error:
        await memory.pin([unit("b", 5_000_000)])
    assert error.value.code == "memory"
    assert trio.current_time() >= module.WAIT_S
    with pytest.raises(RefusedError, match=r"need 11\.0 MB of memory, and this holder has 10\.0 MB"):
        await memory.pin([unit("c", 11_000_000)])
    pin.release()
    (await memory.pin([unit("b", 5_000_000)])).release()


@in_trio
async def test_a_long_load_is_not_a_wait() -> None:
    memory = Memory(10, free=lambda: PLENTY)

    def load() -> object:
        trio.from_thread.run(trio.sleep, 100)
        return object()

    (await memory.pin([unit("a", 1, load)])).release()
    assert list(memory.keys) == [("a", "F32")]


@in_trio
async def test_a_failed_load_leaves_nothing_behind() -> None:
    memory = Memory(10, free=lambda: PLENTY)

    def fail() -> object:
        raise ArtifactError("broken")

    with pytest.raises(ArtifactError):
        await memory.pin([unit("good", 2), unit("bad", 3, fail)])
    assert list(memory.keys) == [("good", "F32")]
    assert memory.pinned == 0


@in_trio
async def test_when_the_device_refuses_all_that_is_loose_goes_and_it_is_tried_again() -> None:
    gone: list[UnitKey] = []
    memory = Memory(100, free=lambda: PLENTY)
    memory.evicted = gone.extend
    kept = await memory.pin([unit("kept", 1)])
    (await memory.pin([unit("loose", 1)])).release()
    tries = 0

    def load() -> object:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OutOfMemoryError
        return object()

    (await memory.pin([unit("new", 1, load)])).release()
    assert gone == [("loose", "F32")]
    assert tries == 2
    kept.release()

    def never() -> object:
        raise OutOfMemoryError

    with pytest.raises(OutOfMemoryError):
        await memory.pin([unit("never", 1, never)])
    assert memory.used == 0


@in_trio
async def test_other_programs_are_given_way_to() -> None:
    free = PLENTY
    memory = Memory(100, free=lambda: free, reserve=10)
    pin = await memory.pin([unit("pinned", 20)])
    for name in "abc":
        (await memory.pin([unit(name, 20)])).release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.watch)
        await trio.sleep(2.5 * module.WATCH_EVERY_S)
        assert memory.used == 80
        free = -15  # 25 less than the reserve
        await trio.sleep(module.WATCH_EVERY_S)
        assert [name for name, _ in memory.keys] == ["pinned", "c"]
        free = -1000
        await trio.sleep(module.WATCH_EVERY_S)
        assert [name for name, _ in memory.keys] == ["pinned"]
        nursery.cancel_scope.cancel()
    with pytest.raises(RefusedError, match="of memory"):
        await memory.pin([unit("d", 5)])
    pin.release()


@in_trio
async def test_preloading_makes_nobody_go() -> None:
    memory = Memory(10, free=lambda: PLENTY)
    assert await memory.preload([unit("a", 6)])
    assert not await memory.preload([unit("b", 6)])
    assert await memory.preload([unit("c", 4)])
    assert [name for name, _ in memory.keys] == ["a", "c"]
    assert memory.pinned == 0


class Machine(RuleBasedStateMachine):
    """The real owner under sessions that come, go, fail to load and are cancelled; the device counts every byte."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device(40)
        self.memory = Memory(40, free=lambda: PLENTY)
        self.pins: list[Pin] = []
        self.evicted: list[UnitKey] = []
        self.memory.evicted = self._evicted

    def _evicted(self, keys: Collection[UnitKey]) -> None:
        assert not {key for pin in self.pins for key in pin.keys} & set(keys)

    @rule(names=st.sets(st.sampled_from("abcdefg"), min_size=1, max_size=3), fails=st.booleans())
    def open(self, names: set[str], fails: bool) -> None:
        units = [self.device.unit(name, 3 + 4 * "abcdefg".index(name)) for name in sorted(names)]
        if fails:

            def load() -> object:
                raise ArtifactError("no")

            units.append(unit("x", 1, load))

        async def pin() -> Pin:
            return await self.memory.pin(units, wait_s=1)

        with suppress(RefusedError, ArtifactError):
            self.pins.append(trio.run(pin, clock=MockClock(autojump_threshold=0)))

    @rule(index=st.integers(0, 20))
    def close(self, index: int) -> None:
        if self.pins:
            pin = self.pins.pop(index % len(self.pins))
            pin.release()
            pin.release()  # once is enough

    @rule()
    def relieve(self) -> None:
        self.memory.relieve()
        assert self.memory.used == self.memory.pinned

    @invariant()
    def every_byte_is_accounted_for(self) -> None:
        assert self.device.used == self.memory.used <= 40
        assert self.device.highest <= 40
        assert {key for pin in self.pins for key in pin.keys} <= set(self.memory.keys)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
