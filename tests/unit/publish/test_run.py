"""Rate and time left, from a clock of ours."""

from __future__ import annotations

from typing import Any

from torrentlm.publish.run import WINDOW_S, Pace


class Watch:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left() -> None:
    watch = Watch()
    pace = Pace(watch)
    assert pace(0, 1, "reading x") == {"event": "progress", "what": "publishing reading x", "done": 0, "total": 1}
    pace(300, 1000, "blocks")  # of an earlier run
    events: list[dict[str, Any]] = []
    for second in range(1, 6):
        watch.now = 100.0 + second
        event = pace(300 + second * 100, 1000, "block")
        assert event is not None
        events.append(event)
    assert events[0]["rate"] == 100
    assert events[-1] == {
        "event": "progress", "what": "publishing block", "done": 800, "total": 1000, "rate": 100.0, "left_s": 2.0,
    }  # fmt: skip


def test_the_rate_is_the_recent_one() -> None:
    watch = Watch()
    pace = Pace(watch)
    pace(0, 10_000, "block")
    watch.now += 1
    pace(5000, 10_000, "block")
    watch.now += WINDOW_S + 1
    pace(5100, 10_000, "block")
    watch.now += 2
    event = pace(5300, 10_000, "block")
    assert event is not None
    assert event["rate"] == 100


def test_not_every_chunk_is_an_event() -> None:
    watch = Watch()
    pace = Pace(watch)
    told = []
    for chunk in range(101):
        watch.now += 0.01
        told.append(pace(chunk, 100, "a" if chunk < 50 else "b"))
    assert 10 <= len([event for event in told if event]) <= 14
    assert not any("rate" in event for event in told[:40] if event)
    assert told[50] is not None  # something else begins
    assert told[-1] is not None  # the end is always told
    assert told[-1]["left_s"] == 0
