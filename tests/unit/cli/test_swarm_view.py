"""What `torrentlm seed` shows, from events alone."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from torrentlm.cli import seed, text
from torrentlm.cli.live import live_view, render
from torrentlm.cli.swarm_view import SwarmView
from torrentlm.manifest.sidecar import Libraries, Outcome, Sidecar

PROOF = Sidecar(
    bytes(32),
    Libraries("2.13.0", "5.23.0", "0.1.0", "x86_64 AVX2"),
    parts=3,
    text=True,
    streamed=False,
    outcomes=(
        Outcome("F32", 0.0, 0.0, 1e-5, 10, 10, 0.0),
        Outcome("BF16", 0.1, 0.01, 0.05, 10, 9, 0.02),
        Outcome("F16", 2.0, 0.2, 0.01, 10, 1, 0.02),
    ),
).described()
EVENTS = [
    {"event": "progress", "what": "publishing block 0", "done": 0, "total": 100},
    {"event": "progress", "what": "publishing block 1", "done": 1, "total": 100},
    {"event": "published", "name": "Tiny", "magnet": "magnet:?xt=1", "proof": PROOF},
    {"event": "starting", "name": "Tiny", "magnet": "magnet:?xt=1", "port": 7000},
    {"event": "joined", "name": "Tiny", "blocks_total": 32},
    {"event": "precision", "precision": "BF16+INT8", "why": "blocks 0-3 need 9 MB; held instead: them in INT8"},
    {"event": "progress", "what": "fetching", "done": 0, "total": 200_000_000, "rate": 0},
    {"event": "progress", "what": "fetching", "done": 1_000_000, "total": 200_000_000, "rate": 5_000_000},
    {"event": "progress", "what": "fetching", "done": 100_000_000, "total": 200_000_000, "rate": 5_000_000},
    {"event": "progress", "what": "loading", "done": 0, "total": 1, "rate": 0},
    {"event": "rechecked", "outcome": "same", "why": ""},
    {"event": "rechecked", "outcome": "differs", "why": "block 1 does not compute that"},
    {"event": "ready", "magnet": "magnet:?xt=1", "port": 7000, "blocks": [0, 1, 2, 7], "blocks_total": 32},
    {"event": "peer", "peer": "127.0.0.1:1", "connected": True, "blocks": [3]},
    {"event": "session", "state": "open", "sessions": 1},
    {"event": "rates", "download": 1.5e6, "upload": 2e3},
    {"event": "peer", "peer": "127.0.0.1:1", "connected": False},
    {"event": "from a later version", "port": 7000},
    {"event": "stopped"},
]


def test_lines_say_each_thing_once():
    view = SwarmView()
    assert [line for event in EVENTS if (line := view.line_for(event))] == [
        "Publishing block 0: 0 B of 100 B",
        "Published Tiny: magnet:?xt=1\n"
        "Proof: exact in F32, BF16 within 0.01 of the whole (9 of 10 tokens agree; allowed 0.05), "
        "F16 OFF by 0.2 of the whole (1 of 10 tokens agree; allowed 0.01); 3 parts, real text; torch 2.13.0, "
        "transformers 5.23.0",
        "Listening on port 7000",
        "Joined Tiny: 32 blocks",
        "Blocks 0-3 need 9 MB; held instead: them in INT8",
        "Fetching: 0 B of 200 MB",
        "Fetching: 100 MB of 200 MB",
        "Loading",
        "Warning: block 1 does not compute that",
        "Ready on port 7000 with blocks 0-2, 7: magnet:?xt=1",
        "Peer 127.0.0.1:1 has block 3",
        "Session open; 1 session now",
        "Peer 127.0.0.1:1 left",
        "Stopped",
    ]


def shown(view: SwarmView) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(view))
    return console.file.getvalue()


def test_the_display_follows():
    view = SwarmView()
    assert "starting" in shown(view)
    for event in EVENTS[:9]:
        view.apply(event)
    assert "the model has 32" in shown(view)
    assert "fetching" in shown(view) and "100 MB of 200 MB" in shown(view) and "5 MB/s" in shown(view)
    for event in EVENTS[9:16]:
        view.apply(event)
    for part in ("Tiny", "port 7000", "serving blocks 0-2, 7 of 32", "127.0.0.1:1  block 3", "↓ 1.5 MB/s", "↑ 2 kB/s"):
        assert part in shown(view)
    assert "exact in F32" in shown(view) and "block 1 does not compute that" in shown(view)
    assert "fetching" not in shown(view)
    view.apply(EVENTS[16])
    assert "none yet" in shown(view)


def test_what_it_waits_for_is_said_once_a_change_and_until_somebody_answers():
    view = SwarmView()
    waits = [{"event": "waiting", "why": why} for why in ("no peer answers", "no peer answers", "no DHT node answers")]
    lines = [view.line_for(event) for event in waits]
    assert lines == ["Waiting: no peer answers", None, "Waiting: no DHT node answers"]
    assert "no DHT node answers" in shown(view)
    view.line_for({"event": "rates", "download": 0.0, "upload": 0.0})
    assert "no DHT node answers" in shown(view)
    view.line_for({"event": "joined", "name": "Tiny", "blocks_total": 32})
    assert "waiting" not in shown(view)
    assert view.line_for(waits[0]) == lines[0]


def test_many_peers_do_not_fill_the_screen():
    view = SwarmView(peers={f"10.0.0.{number}:1": "block 1" for number in range(100)})
    assert "and 88 more" in shown(view)


def test_live_prints_the_magnet_in_one_piece_and_once():
    output = io.StringIO()
    magnet = "magnet:?xt=urn:btih:" + "ab" * 20 + "&dn=[bold]" + "x" * 100
    with live_view(Console(file=output, width=60, force_terminal=True)) as show:
        show({"event": "published", "magnet": magnet})
        show({"event": "ready", "magnet": magnet, "port": 1, "blocks": []})
    assert output.getvalue().count(magnet) == 1


def test_json_is_one_object_per_line(capsys: pytest.CaptureFixture[str]):
    with seed._view(as_json=True) as show:
        for event in EVENTS:
            show(event)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == EVENTS


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (141_900_000, "142 MB"), (999_700, "1 MB"), (5e13, "50 TB")],
)
def test_sizes_as_text(number: float, said: str):
    assert text.size(number) == said


def test_blocks_as_text():
    assert [text.blocks(blocks) for blocks in ([], [3], [2, 1, 0, 7])] == ["no blocks", "block 3", "blocks 0-2, 7"]


def test_an_adapter_is_told_and_leaves_the_models_name_alone() -> None:
    view = SwarmView()
    for event in EVENTS:
        view.apply(event)
    said = view.line_for({"event": "adapter", "name": "pirate", "magnet": "magnet:?xt=9", "blocks": [1]})
    assert said == "Published the adapter pirate: magnet:?xt=9"
    assert (view.name, view.magnet, view.adapters) == ("Tiny", "magnet:?xt=1", {"pirate": "magnet:?xt=9"})
    console = Console(file=io.StringIO(), width=60)
    with live_view(console) as show:
        show({"event": "adapter", "name": "pirate", "magnet": "magnet:?xt=9", "blocks": [1]})
    assert "magnet:?xt=9" in console.file.getvalue()
