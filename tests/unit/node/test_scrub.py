"""Files that were believed by their stamps are hashed, each in its turn, and bad ones are named once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.swarm.test_store import put_block
from torrentlm.node import scrub
from torrentlm.node.scrub import AGAIN_AFTER_S, _next_due, check_slowly
from torrentlm.swarm.store import Store


def alter(path: Path) -> None:
    """As a bad disk does it: neither size nor time change."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_youngest_first_then_the_longest_unchecked() -> None:
    held = {"old": 1.0, "young": 2.0}
    checked: dict[str, float] = {"gone": 5.0}
    assert _next_due(held, checked, 10) == "young"
    assert not checked
    checked["young"] = 10
    assert _next_due(held, checked, 11) == "old"
    checked["old"] = 11
    assert _next_due(held, checked, 12) is None
    assert _next_due(held, checked, 10 + AGAIN_AFTER_S) == "young"
    assert _next_due({}, checked, 10 + AGAIN_AFTER_S) is None


@pytest.mark.parametrize("how", ["altered", "unreadable"])
def test_what_is_bad_is_named(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    async def main(store: Store) -> None:
        async def damaged(name: str) -> None:
            found.append(name)
            store.mark_unverified(name)

        with trio.move_on_after(2 * AGAIN_AFTER_S + 10_000):
            await check_slowly(store, damaged, look_every=3600)

    with Store(tmp_path) as store:
        good, bad = put_block(store, b"good" * 1000), put_block(store, b"bad" * 1000)
        for name in (good, bad):
            store.mark_verified(name)
        if how == "altered":
            alter(store.path(bad))
        else:
            real = Path.open

            def unreadable(path: Path, *arguments: object, **options: object) -> object:
                if path.name == bad:
                    raise OSError(5, "Input/output error")
                return real(path, *arguments, **options)  # type: ignore[call-overload]

            monkeypatch.setattr(scrub.Path, "open", unreadable)
        trio.run(main, store, clock=MockClock(autojump_threshold=0.01))
        assert found == [bad]
        assert store.held() == {good}


def test_what_goes_meanwhile_is_nobodys_fault(tmp_path: Path) -> None:
    async def main(store: Store) -> None:
        async def damaged(name: str) -> None:
            raise AssertionError(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_slowly, store, damaged)
            await trio.sleep(0.01)
            store.mark_unverified(name)
            store.path(name).unlink()
            await trio.sleep(3600)
            nursery.cancel_scope.cancel()

    with Store(tmp_path) as store:
        name = put_block(store, bytes(3 << 20))
        store.mark_verified(name)
        alter(store.path(name))
        trio.run(main, store, clock=MockClock(autojump_threshold=0.01))
