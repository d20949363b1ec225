"""The room for block files on a real folder: pins, promises, last use; a machine that does all in any order."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.swarm.test_store import put_block
from torrentlm.errors import DiskFullError, StorageError
from torrentlm.manifest.torrent import pieces_root
from torrentlm.swarm import space as space_module
from torrentlm.swarm.space import Space
from torrentlm.swarm.store import Store

Usage = namedtuple("Usage", "total used free")
ABSENT = "0" * 64 + ".safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(space_module.shutil, "disk_usage", lambda path: Usage(0, 0, size))


def filled(store: Store, count: int, size: int = 10_000) -> list[str]:
    names = [put_block(store, bytes([number]) * size) for number in range(count)]
    for number, name in enumerate(names):
        os.utime(store.path(name), (number, number))
        store.mark_verified(name)
    return names


def test_space_is_asked_for_what_is_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    [here] = filled(store, 1)
    free(monkeypatch, 100_000_000)
    space = Space(store, None)
    assert space.make_room({here: 10_000, ABSENT: 100_000_000}) == ()
    with pytest.raises(DiskFullError) as caught:
        space.make_room({here: 10_000, ABSENT: 250_000_000})
    assert str(caught.value).startswith(f"disk full: block set needs 250 MB, {store.data} has 100 MB free")


def test_half_fetched_file_counts_by_what_it_takes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.path(ABSENT).open("wb") as file:
        file.write(os.urandom(4_000_000))
        file.truncate(10_000_000)
    free(monkeypatch, 6_100_000)
    assert Space(store, None).make_room({ABSENT: 10_000_000}) == ()
    free(monkeypatch, 5_000_000)
    with pytest.raises(DiskFullError, match="disk full"):
        Space(store, None).make_room({ABSENT: 10_000_000})


def test_what_is_promised_counts_until_it_is_taken_back(store: Store) -> None:
    space = Space(store, 100)
    space.promise({ABSENT: 60})
    space.promise({ABSENT: 60})
    other = "1" * 64 + ".safetensors"
    for _ in range(2):
        with pytest.raises(StorageError, match="--disk to"):
            space.make_room({other: 60})
        ended = space.take_back([ABSENT])
    assert ended == (ABSENT,)
    assert space.make_room({other: 60}) == ()


def test_the_last_use_is_remembered(store: Store) -> None:
    first, second, third = filled(store, 3)
    Space(store, 30_000).used([first])
    again = Space(store, 30_000)
    assert again.make_room({ABSENT: 10_000}) == (second,)
    again.pin([second], "model")
    again.pin([second], "other model")
    again.unpin([second], "model")
    assert again.make_room({ABSENT: 20_000}) == (third, first)
    again.pin([third], "model")
    with pytest.raises(StorageError, match=r"disk = 0\.0 MB is too small: .* raise --disk to 0\.1 MB"):
        again.make_room({ABSENT: 20_000})
    again.unpin([second], "other model")
    assert again.make_room({ABSENT: 20_000}) == (second, first)


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"' + "0" * 64 + '.safetensors": "now"}', "nan"])
def test_a_damaged_record_of_uses_only_loses_the_order(store: Store, content: str) -> None:
    first, second = filled(store, 2)
    (store.data / "used.json").write_text(content)
    assert Space(store, 20_000).make_room({ABSENT: 10_000}) == (first,)
    assert second in Space(store, 20_000).kept()


def test_files_that_are_not_ours_count_and_stay(store: Store) -> None:
    (store.blocks / "notes.txt").write_bytes(os.urandom(9000))
    with pytest.raises(StorageError, match="must stay"):
        Space(store, 10_000).make_room({ABSENT: 2000})
    assert Space(store, 12_000).make_room({ABSENT: 2000}) == ()


def test_an_eviction_needs_no_room_for_its_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    [name] = filled(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torrentlm.swarm.store.write_atomically", full)
        space = Space(store, 0)
        space.withdraw(name)
        space.remove(name)
    assert not store.held()
    store.close()
    with Store(store.data) as again:
        assert not again.held()


SIZES = [1000, 3000, 5000, 7000, 9000, 11_000]
BUDGET = 20_000


class Machine(RuleBasedStateMachine):
    """Files come, are used, pinned and let go in any order, under a budget, beside a model of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Store(self.folder)
        self.now = 0.0
        self.space = Space(self.store, BUDGET, lambda: self.now)
        self.content = {}
        for number, size in enumerate(SIZES):
            data = bytes([number]) * size
            (self.folder / "staged").write_bytes(data)
            self.content[f"{pieces_root(self.folder / 'staged').hex()}.safetensors"] = data
        self.names = list(self.content)
        self.pins: dict[str, set[str]] = {name: set() for name in self.names}
        self.coming: list[str] = []
        self.uses: dict[str, float] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def must_stay(self) -> set[str]:
        return {name for name in self.names if self.pins[name] or name in self.coming}

    def sizes(self, names: set[str]) -> int:
        return sum(len(self.content[name]) for name in names)

    @rule(number=st.integers(0, 5))
    def ask(self, number: int) -> None:
        name = self.names[number]
        before, staying = self.store.held(), self.must_stay()
        partial = {path.name for path in self.store.blocks.iterdir()} - before - staying
        try:
            going = self.space.make_room({name: len(self.content[name])})
        except StorageError:
            counted = (staying & before) | set(self.coming) | {name}
            assert self.sizes(counted) > BUDGET
            return
        assert not set(going) & (staying | {name})
        left = (before - set(going)) - staying - {name}
        evicted = set(going) - partial
        assert all(
            self.uses[gone] <= self.uses[stays] or self.sizes({stays}) <= self.sizes({gone})
            for gone in evicted
            for stays in left
        )
        for gone in going:
            self.space.withdraw(gone)
            self.space.remove(gone)
        self.space.promise({name: len(self.content[name])})
        self.coming.append(name)

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), share=st.sampled_from([0.5, 1.0]))
    def receive(self, data: st.DataObject, share: float) -> None:
        name = data.draw(st.sampled_from(self.coming))
        if self.store.holds(name):
            return
        content = self.content[name]
        self.store.path(name).write_bytes(content[: int(len(content) * share)])
        if share == 1.0:
            self.store.mark_verified(name)
            self.touch(name)

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.coming))
        self.coming.remove(name)
        assert self.space.take_back([name]) == (() if name in self.coming else (name,))

    @rule(number=st.integers(0, 5), reason=st.sampled_from("ab"))
    def pin(self, number: int, reason: str) -> None:
        name = self.names[number]
        if self.store.holds(name):
            self.space.pin([name], reason)
            self.pins[name].add(reason)

    @rule(number=st.integers(0, 5), reason=st.sampled_from("ab"))
    def unpin(self, number: int, reason: str) -> None:
        self.space.unpin([self.names[number]], reason)
        self.pins[self.names[number]].discard(reason)

    @rule(number=st.integers(0, 5))
    def use(self, number: int) -> None:
        if self.store.holds(self.names[number]):
            self.touch(self.names[number])

    def touch(self, name: str) -> None:
        self.now += 1
        self.uses[name] = self.now
        self.space.used([name])

    @rule()
    def start_again(self) -> None:
        """Killed: promises and pins are gone, what is complete and when it was used is not."""
        held = self.store.held()
        self.store.close()
        self.store = Store(self.folder)
        self.space = Space(self.store, BUDGET, lambda: self.now)
        assert self.store.held() == held
        self.pins = {name: set() for name in self.names}
        self.coming = []

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.sizes(set(self.store.held()) | set(self.coming)) <= BUDGET
        assert sum(path.stat().st_size for path in self.store.blocks.iterdir()) <= BUDGET

    @invariant()
    def what_is_pinned_is_here(self) -> None:
        assert {name for name in self.names if self.pins[name]} <= self.store.held()

    @invariant()
    def what_is_held_is_good(self) -> None:
        for name in self.store.held():
            assert self.store.path(name).read_bytes() == self.content[name]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
