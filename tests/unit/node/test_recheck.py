"""What a node makes of checks that fail: its own proof is believed, one peer's invention stops nobody."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio

from torrentlm.errors import UnsupportedModelError
from torrentlm.holder.model import Rechecked
from torrentlm.manifest.sidecar import Libraries, Outcome, Sidecar
from torrentlm.node import recheck as checking
from torrentlm.node.recheck import Opinion, judge, recheck
from torrentlm.node.sidecars import Found

HERE = Libraries("2.13.0+cpu", "5.23.0", "0.1.0", "x86_64 AVX2")
SAME = Libraries("2.13.0+cu130", "5.23.0", "0.1.0", "another processor")
OTHER = Libraries("2.13.0", "5.20.0", "0.1.0", "x86_64 AVX2")
GOOD, BAD = Rechecked(3, 0.0, good=True), Rechecked(3, 0.8, good=False)


def opinion(made_with: Libraries, rechecked: Rechecked, *, own: bool = False) -> Opinion:
    return Opinion(made_with, own, rechecked)


@pytest.mark.parametrize(
    ("opinions", "outcome"),
    [
        ([], "unknown"),
        ([opinion(SAME, GOOD)], "same"),
        ([opinion(OTHER, GOOD)], "same"),
        ([opinion(OTHER, BAD)], "refused"),
        ([opinion(SAME, BAD)], "differs"),
        ([opinion(OTHER, BAD), opinion(SAME, GOOD)], "same"),
        ([opinion(OTHER, BAD), opinion(SAME, BAD)], "differs"),
        ([opinion(OTHER, BAD), opinion(OTHER, BAD)], "refused"),
        ([opinion(SAME, BAD, own=True)], "refused"),
        ([opinion(OTHER, BAD, own=True), opinion(SAME, GOOD)], "refused"),
        ([opinion(SAME, GOOD, own=True), opinion(OTHER, BAD)], "same"),
    ],
)
def test_verdicts(opinions: list[Opinion], outcome: str) -> None:
    verdict = judge(opinions, HERE)
    assert verdict.outcome == outcome
    assert bool(verdict.why) == (outcome in ("refused", "differs"))
    assert "\n" not in verdict.why


def test_the_sentence_says_what_to_do() -> None:
    why = judge([opinion(OTHER, BAD)], HERE).why
    assert "block 3" in why and "transformers 5.20.0" in why and "transformers 5.23.0" in why
    assert "--no-recheck" in why


def sidecar(made_with: Libraries) -> Sidecar:
    return Sidecar(bytes(32), made_with, 3, True, False, (Outcome("F32", 0.0, 0.0, 1e-5, 1, 1, 0.0),))


@dataclass
class Sidecars:
    """Those of a node and of its peers; each with what a check against it gives."""

    own: Found | None = None
    peers: list[Found] = field(default_factory=list)
    asked: bool = False
    kept: list[Found] = field(default_factory=list)

    async def stored(self) -> Found | None:
        return self.own

    async def ask(self) -> list[Found]:
        self.asked = True
        return self.peers

    async def keep(self, found: Found) -> None:
        self.kept.append(found)


class Model:
    """A held model that agrees with the sidecars that it is told."""

    def __init__(self, results: dict[int, Rechecked | None]) -> None:
        self.results = results

    def recheck(self, blocks: list[int], sidecar: Sidecar) -> Rechecked | None:
        assert blocks == [3]
        return self.results[id(sidecar)]


def run(sidecars: Sidecars, *results: Rechecked | None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(checking, "libraries", lambda: HERE)
    found = [*([sidecars.own] if sidecars.own else []), *sidecars.peers]
    model = Model({id(one.sidecar): result for one, result in zip(found, results, strict=True)})
    said: list[dict[str, Any]] = []
    trio.run(recheck, cast(Any, model), [3], cast(Any, sidecars), said.append)
    return said


def peer(made_with: Libraries = OTHER) -> Found:
    return Found(sidecar(made_with), b"", "10.0.0.1:1")


def own(made_with: Libraries = HERE) -> Found:
    return Found(sidecar(made_with), b"", "this node", own=True)


def test_who_proved_it_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    sidecars = Sidecars(own())
    assert run(sidecars, GOOD, monkeypatch=monkeypatch) == [{"event": "rechecked", "outcome": "same", "why": ""}]
    assert not sidecars.asked and not sidecars.kept


def test_an_upgrade_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    sidecars = Sidecars(own(OTHER))
    with pytest.raises(UnsupportedModelError, match="install those versions"):
        run(sidecars, BAD, monkeypatch=monkeypatch)
    assert not sidecars.asked


def test_a_peer_that_agrees_is_kept_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sidecars = Sidecars(None, [peer(), peer(SAME), peer()])
    said = run(sidecars, BAD, GOOD, None, monkeypatch=monkeypatch)
    assert said[0]["outcome"] == "same"
    assert sidecars.kept == [sidecars.peers[1]]


def test_a_wrong_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformers 5\.20\.0"):
        run(Sidecars(None, [peer()]), BAD, monkeypatch=monkeypatch)


def test_an_invention_stops_nobody_who_has_those_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    sidecars = Sidecars(None, [peer(SAME)])
    [said] = run(sidecars, BAD, monkeypatch=monkeypatch)
    assert said["outcome"] == "differs" and "served all the same" in said["why"]
    assert not sidecars.kept


def test_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Sidecars(), monkeypatch=monkeypatch)[0]["outcome"] == "unknown"
    assert run(Sidecars(None, [peer()]), None, monkeypatch=monkeypatch)[0]["outcome"] == "unknown"


def test_what_was_heard_before_is_asked_about_again_only_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Found(sidecar(OTHER), b"", "a peer, earlier")
    agreeing = Sidecars(heard)
    assert run(agreeing, GOOD, monkeypatch=monkeypatch)[0]["outcome"] == "same"
    assert not agreeing.asked
    failing = Sidecars(heard, [peer(SAME)])
    assert run(failing, BAD, GOOD, monkeypatch=monkeypatch)[0]["outcome"] == "same"
    assert failing.asked and failing.kept
