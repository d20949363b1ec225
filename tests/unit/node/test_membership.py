"""How long a node waits for a model, and what it says meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from torrentlm.config import NodeConfig
from torrentlm.errors import NetworkError, StorageError
from torrentlm.node import membership
from torrentlm.node.fetch import WAITING_EVERY_S, say_waiting
from torrentlm.node.membership import UNANSWERED_S, Membership
from torrentlm.records import Endpoint
from torrentlm.route.registry import Snapshot


def bare(**fields: Any) -> Membership:
    """A membership of which only these fields are there."""
    made = Membership.__new__(Membership)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("answered", "connected", "timeout", "ends"),
    [
        (0, 0, float("inf"), UNANSWERED_S),
        (0, 0, 30.0, 30.0),
        (1, 0, 400.0, 400.0),
        (0, 1, 400.0, 400.0),
        (1, 0, float("inf"), None),
    ],
)
def test_only_silence_ends_a_wait_without_limit(
    answered: int, connected: int, timeout: float, ends: float | None
) -> None:
    async def main() -> None:
        made = bare(peers=SimpleNamespace(snapshot=lambda: Snapshot((), 2, answered)))
        transfer = cast(Any, SimpleNamespace(progress=SimpleNamespace(peers=connected)))
        started = trio.current_time()
        with trio.move_on_after(1000) as limit:
            with pytest.raises(NetworkError, match=f"{answered} of 2 known peers answered"):
                await made._give_up(transfer, timeout)
            assert trio.current_time() - started == pytest.approx(ends, abs=1)
        assert limit.cancelled_caught == (ends is None)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_waiting_is_said_when_its_reason_changes() -> None:
    async def main() -> None:
        said: list[dict[str, Any]] = []
        reasons = iter(["a", "a", None, "a", "b"])
        with trio.move_on_after(5.5 * WAITING_EVERY_S):
            await say_waiting(said.append, lambda: next(reasons))
        assert said == [{"event": "waiting", "why": why} for why in "aab"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_address_book_that_cannot_be_written_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(peers: object) -> None:
        raise StorageError("disk full")

    async def fail() -> None:
        raise NetworkError("the reason")

    def nothing(*_: object) -> None:
        pass

    async def resolve(endpoints: object) -> tuple[Endpoint, ...]:
        return ()

    monkeypatch.setattr(membership, "resolve", resolve)
    store = SimpleNamespace(load_peers=tuple, save_peers=full)
    made = bare(
        magnet=SimpleNamespace(peers=()),
        peers=SimpleNamespace(learn=nothing, run=fail, reachable=lambda: (Endpoint("10.0.0.1", 1),)),
        _parts=SimpleNamespace(store=store, config=NodeConfig()),
    )
    with pytest.raises(ExceptionGroup) as caught:
        trio.run(made.run)
    assert caught.group_contains(NetworkError) and not caught.group_contains(StorageError)
