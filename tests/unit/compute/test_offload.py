"""The stage by itself: whatever the order of blocks, and however late copies come, each block computes with its own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torrentlm.compute import offload
from torrentlm.compute.offload import HostBlock, Offload, Stage, Streamed, Turns
from torrentlm.compute.precision import packed_bytes
from torrentlm.compute.quantization.narrow import Narrow
from torrentlm.compute.quantization.packed import pack
from torrentlm.compute.quantization.tensor import QuantizedTensor
from torrentlm.route.assign import SLABS

CPU = torch.device("cpu")
F32 = {"w": torch.float32}
ROOM = packed_bytes(4 * 24, 1)


def host(place: int, value: float | None = None) -> HostBlock:
    weight = torch.full((4, 6), float(place if value is None else value))
    return HostBlock(place, range(place, place + 1), [("w", weight)], ROOM, F32, CPU)


class Late:
    """Copies as a device has them that does nothing before it must, and where everything takes long: what is started
    is done when somebody waits for it, in order. Nothing may be started into a slab that computes.
    """

    def __init__(self) -> None:
        self.started: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.busy: set[int] = set()
        self.copied = 0

    def start(self, slab: int, target: torch.Tensor, source: torch.Tensor) -> None:
        assert slab not in self.busy, "what computes there is not done"
        self.started.append((slab, target, source))

    def wait(self, slab: int) -> None:
        while any(one[0] == slab for one in self.started):  # in their order, as a stream has it
            _, target, source = self.started.pop(0)
            target.copy_(source)
            self.copied += 1
        self.busy.add(slab)

    def used(self, slab: int) -> None:
        self.busy.discard(slab)


def computed(stage: Stage, blocks: list[HostBlock], order: list[int]) -> None:
    """One forward over the blocks at these places; each reads its own."""
    seen = {block.place: stage.tensors(block)["w"] for block in blocks}
    with stage.turn():
        for place in order:
            stage.bring(blocks[place])
            assert (seen[place] == place).all()
            stage.done(blocks[place])


@given(st.integers(1, 7), st.lists(st.lists(st.integers(0, 6), max_size=7), max_size=6))
def test_every_block_finds_its_own_bytes(count: int, forwards: list[list[int]]) -> None:
    stage, blocks = Stage(CPU, ROOM, Late()), [host(place) for place in range(count)]
    for order in forwards:
        computed(stage, blocks, [place % count for place in order])


@settings(max_examples=30)
@given(st.integers(3, 9), st.integers(0, 5), st.integers(1, 4))
def test_a_span_that_runs_again_and_again_has_each_block_come_once_a_time(count: int, first: int, spans: int) -> None:
    """In steady state nothing is copied that is not used, whatever part of the blocks runs, in several hops or one."""
    late = Late()
    stage, blocks = Stage(CPU, ROOM, late), [host(place) for place in range(first + count)]
    ring = list(range(first, first + count))
    parts = [ring[at * count // spans : (at + 1) * count // spans] for at in range(spans)]
    for _ in range(3):
        for part in parts:
            computed(stage, blocks, part)
    before, waited = late.copied, []
    for part in parts:
        computed(stage, blocks, part)
        waited.append(len(late.started))
    # A slab whose blocks are one has it already.
    moving = [place for place in ring if sum(other % SLABS == place % SLABS for other in ring) > 1]
    assert late.copied - before == len(moving)
    assert max(waited) <= SLABS


def test_the_next_block_comes_while_one_computes() -> None:
    late = Late()
    stage, blocks = Stage(CPU, ROOM, late), [host(place) for place in range(4)]
    for block in blocks:
        stage.tensors(block)
    with stage.turn():
        stage.bring(blocks[0])
        assert [one[0] for one in late.started] == [1]
        stage.done(blocks[0])
        stage.bring(blocks[1])
        stage.done(blocks[1])
        assert [one[0] for one in late.started] == [0, 1]  # blocks 2 and 3 are on their way before anybody asks
        for block in blocks[2:]:
            stage.bring(block)
            stage.done(block)
        assert [one[0] for one in late.started] == [0, 1]  # and those of the next token


def test_a_forward_that_fails_leaves_no_slab_in_use() -> None:
    late = Late()
    stage, blocks = Stage(CPU, ROOM, late), [host(place) for place in range(3)]
    with pytest.raises(RuntimeError, match="half-way"), stage.turn():
        stage.bring(blocks[0])
        raise RuntimeError("half-way")
    assert not late.busy
    computed(stage, blocks, [2, 0, 1])


def test_one_forward_at_a_time_uses_the_slabs() -> None:
    stage, order = Stage(CPU, ROOM), []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with stage.turn():
            inside.set()
            assert go.wait(10)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    assert inside.wait(10)

    def second() -> None:
        with stage.turn():
            order.append("second")

    after = threading.Thread(target=second)
    after.start()
    go.set()
    other.join(10)
    after.join(10)
    assert order == ["first", "second"]


def test_a_block_that_goes_is_gone_and_another_may_take_its_place() -> None:
    stage, blocks = Stage(CPU, ROOM), [host(place) for place in range(4)]
    computed(stage, blocks, [0, 1, 2, 3])
    kept = blocks[2].bytes.untyped_storage().data_ptr()
    stage.forget([0, 2])
    blocks[0], blocks[2] = host(0, 10), host(2, 12)
    gc.collect()
    assert all(block is None or block.bytes.data_ptr() != kept for block in stage._there)
    tensors = [stage.tensors(block)["w"] for block in blocks]
    with stage.turn():
        for block, tensor, due in zip(blocks, tensors, (10, 1, 12, 3), strict=True):
            stage.bring(block)
            assert (tensor == due).all()
            stage.done(block)


def quantized(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: QuantizedTensor(pack(weight, kind), torch.bfloat16)


@pytest.mark.parametrize("kind", ["INT8", "INT4"])
@pytest.mark.parametrize("turned", [False, True])
def test_whatever_a_tensor_is_it_comes_as_it_was(kind: str, turned: bool) -> None:
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    tensors: dict[str, torch.Tensor] = {
        "packed": QuantizedTensor(pack(weight, kind), torch.bfloat16, turned),
        "turned": weight.T,
        "mask": torch.tensor([True, False, True]),
        "number": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "plain": weight.bfloat16(),
    }
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    size = packed_bytes(sum(part.nbytes for part in (*tensors.values(), weight)), len(tensors))
    block = HostBlock(0, range(1), tensors.items(), size, dtypes, CPU)
    assert not block.staying
    stage = Stage(CPU, size)
    found = stage.tensors(block)
    with stage.turn():
        stage.bring(block)
        for name, due in tensors.items():
            got = found[name]
            assert (got.dtype, got.shape) == (due.dtype, due.shape)
            if isinstance(due, QuantizedTensor):
                assert isinstance(got, QuantizedTensor) and torch.equal(got.dense(), due.dense())
                x = torch.randn(3, due.shape[1]).bfloat16()
                assert torch.equal(torch.nn.functional.linear(x, got), torch.nn.functional.linear(x, due))
            else:
                assert torch.equal(got, due) and got.stride() == due.stride()
                assert got.data_ptr() % 64 == 0 or not got.numel()
        stage.done(block)


def test_what_has_no_room_or_another_dtype_stays_on_the_device() -> None:
    tensors = {
        "w": torch.ones(4, 6),
        "wide": torch.ones(4, dtype=torch.float64),
        "large": torch.ones(10_000),
        "narrow": QuantizedTensor(Narrow(torch.ones(4, 6).bfloat16()), torch.float32),
    }
    block = HostBlock(0, range(1), tensors.items(), ROOM, dict.fromkeys(tensors, torch.float32), CPU)
    assert set(block.staying) == {"wide", "large", "narrow"}
    assert set(Stage(CPU, ROOM).tensors(block)) == set(tensors)


def test_a_block_comes_before_what_is_computed_in_front_of_its_first_layer() -> None:
    blocks = [HostBlock(n, range(1 + 2 * n, 3 + 2 * n), [("w", torch.full((4, 6), n))], ROOM, F32, CPU) for n in (0, 1)]
    stage = Stage(CPU, ROOM)
    turns = Turns(Offload(stage, {"a": blocks[0], "b": blocks[1]}), 1)
    for block in blocks:
        stage.tensors(block)
    with turns.step():
        assert stage._there[0] is blocks[0] and stage._computing == {0}
        turns.behind(1)
        assert stage._computing == {0}
        turns.behind(2)
        assert stage._there[1] is blocks[1] and stage._computing == {1}
        turns.behind(3)
        turns.behind(4)
        assert not stage._computing


class Queues:
    """CUDA as ``Streamed`` uses it: each stream does what it was given in order, whenever it likes (``pick`` says which
    stream goes on), and an event holds one back until what another was given before it is done.
    """

    def __init__(self, pick: Callable[[list[int]], int]) -> None:
        self._pick = pick
        self.queues: list[list[Callable[[], bool]]] = []
        self.compute = FakeStream(self)
        self.now = self.compute

    def Stream(self, device: object) -> FakeStream:
        return FakeStream(self)

    def Event(self) -> FakeEvent:
        return FakeEvent()

    def current_stream(self, device: object) -> FakeStream:
        return self.compute

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def run(self) -> None:
        """Until everything is done. One that waits is passed over; if all do, nothing ever comes."""
        while waiting := [number for number, queue in enumerate(self.queues) if queue]:
            first = self._pick(waiting)
            for number in (first, *waiting):
                if self.queues[number][0]():
                    self.queues[number].pop(0)
                    break
            else:
                raise AssertionError("each waits for the other")


class FakeStream:
    def __init__(self, queues: Queues) -> None:
        self._queue: list[Callable[[], bool]] = []
        queues.queues.append(self._queue)

    def do(self, work: Callable[[], object]) -> None:
        self._queue.append(lambda: work() is None or True)

    def wait_stream(self, stream: FakeStream) -> None:
        event = FakeEvent()
        event.record(stream)
        self.wait_event(event)

    def wait_event(self, event: FakeEvent) -> None:
        due = event.recorded
        self._queue.append(lambda: event.passed >= due)


class FakeEvent:
    recorded = passed = 0

    def record(self, stream: FakeStream) -> None:
        self.recorded += 1
        number = self.recorded

        def passed() -> None:
            self.passed = max(self.passed, number)

        stream.do(passed)


class Pages:
    """Memory of the device: what is done to it is done by the stream that is current."""

    def __init__(self, queues: Queues, pages: torch.Tensor) -> None:
        self._queues, self._pages = queues, pages

    def __getitem__(self, part: slice) -> Pages:
        return Pages(self._queues, self._pages[part])

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._queues.now.do(lambda: self._pages.copy_(source) is None)

    def record_stream(self, stream: FakeStream) -> None:
        assert isinstance(stream, FakeStream)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5))
def test_streams_and_events_keep_copies_and_computing_in_order(
    data: st.DataObject, count: int, forwards: list[list[int]]
) -> None:
    queues = Queues(lambda waiting: data.draw(st.sampled_from(waiting)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "_cuda", queues)
        stage = Stage(CPU, ROOM, Streamed(CPU))
        blocks = [host(place) for place in range(count)]
        there = [stage.tensors(block)["w"] for block in blocks]
        stage._slabs = tuple(Pages(queues, pages) for pages in stage._slabs)  # type: ignore[assignment]
        found: list[tuple[int, float, float]] = []
        for order in forwards:
            with stage.turn():
                for place in (place % count for place in order):
                    stage.bring(blocks[place])
                    for _ in range(2):  # two operations that read it
                        queues.compute.do(partial(read, found, place, there[place]))
                    stage.done(blocks[place])
    queues.run()
    assert len(found) == 2 * sum(map(len, forwards))
    assert all(low == place == high for place, low, high in found)


def read(found: list[tuple[int, float, float]], place: int, tensor: torch.Tensor) -> None:
    found.append((place, float(tensor.min()), float(tensor.max())))
