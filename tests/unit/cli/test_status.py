"""``torrentlm status``: what a node wrote, for people and for programs, and what there is to say without one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from torrentlm.cli import commands
from torrentlm.cli.status import command
from torrentlm.node.status import FILE, STALE_S

STATUS: dict[str, Any] = {
    "endpoint": "127.0.0.1:6881",
    "models": [
        {
            "name": "Tiny",
            "magnet": "magnet:?",
            "precision": "BF16",
            "held": [0, 1, 2, 3],
            "resident": [0, 1],
            "offered": [0, 1, 2],
            "fetching": [5],
            "peers": 3,
        }
    ],
    "devices": [
        {
            "name": "cpu (x, 2 threads)",
            "weights": {"budget": 4_000_000_000, "used": 1_000_000_000, "pinned": 500_000_000},
            "kv": {"budget": 1_000_000_000, "used": 0},
        }
    ],
    "prefetched": 3_000_000,
    "sessions": 2,
    "disk": {"used": 7_000_000, "budget": None},
    "rates": {"download": 1000, "upload": 0},
}


def written(data: Path, **changes: Any) -> dict[str, Any]:
    status = STATUS | {"at": time.time()} | changes
    (data / FILE).write_text(json.dumps(status))
    return status


def test_for_people(tmp_path: Path) -> None:
    written(tmp_path)
    shown = CliRunner().invoke(command, ["--data", str(tmp_path)], catch_exceptions=False).output
    for words in ("127.0.0.1:6881", "cpu (x, 2 threads)", "1 GB", "4 GB", "500 MB", "3 MB", "7 MB", "0-2", "BF16"):
        assert words in shown
    assert "█████░░░" in shown


def test_several_devices_are_told_apart(tmp_path: Path) -> None:
    written(tmp_path, devices=[STATUS["devices"][0] | {"device": name} for name in ("cuda:0", "cuda:1")])
    shown = CliRunner().invoke(command, ["--data", str(tmp_path)], catch_exceptions=False).output
    assert "cuda:0: cpu (x, 2 threads)" in shown and "cuda:1: cpu (x, 2 threads)" in shown


def test_what_is_offloaded_is_shown_where_there_is_room_for_it(tmp_path: Path) -> None:
    aside = {"budget": 64_000_000_000, "used": 32_000_000_000, "pinned": 0}
    for offloaded, there in ((aside, True), (aside | {"budget": 0}, False)):
        written(tmp_path, devices=[STATUS["devices"][0] | {"offloaded": offloaded}])
        shown = CliRunner().invoke(command, ["--data", str(tmp_path)], catch_exceptions=False).output
        assert ("offloaded" in shown and "64 GB" in shown) == there


def test_for_programs(tmp_path: Path) -> None:
    status = written(tmp_path)
    shown = CliRunner().invoke(command, ["--data", str(tmp_path), "--json"], catch_exceptions=False).output
    assert json.loads(shown) == status


@pytest.mark.parametrize("content", ["", "{", "[]", '{"at": "now"}', json.dumps({"at": 1.0})])
def test_no_node_runs(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_text(content)
    assert commands.run(["status", "--data", str(tmp_path)]) == 1
    assert f"No node runs with the data folder {tmp_path}" in capsys.readouterr().err


def test_what_a_node_left_behind_is_not_taken_for_one(tmp_path: Path) -> None:
    written(tmp_path, at=time.time() - STALE_S - 1)
    assert commands.run(["status", "--data", str(tmp_path)]) == 1
    assert commands.run(["status", "--data", str(tmp_path / "nowhere")]) == 1
