"""``torrentlm doctor``: the table, the object and the status, of a machine made to order and of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torrentlm.cli import commands as cli
from torrentlm.cli import doctor
from torrentlm.compute.threads import available_cores
from torrentlm.config import NodeConfig
from torrentlm.node import checkup

COSTS = (
    {"precision": "F32", "bytes_per_weight": 4.0, "decode": 1e10, "prompt": 1e12, "error": 0.0, "lacking": ""},
    {"precision": "BF16", "bytes_per_weight": 0, "decode": 0, "prompt": 0, "error": 0, "lacking": "cuda:0 lacks it."},
)
DEVICE = {
    "name": "cuda:0",
    "backend": "cuda",
    "model": "A GPU",
    "memory_total": 24_000_000_000,
    "memory_free": 20_000_000_000,
    "units": 82,
    "features": ["sm_75"],
    "used": True,
    "budget": 16_000_000_000,
    "weights_budget": 12_000_000_000,
    "kv_budget": 4_000_000_000,
    "measured": {"read": 9e11, "upload": 6e9, "pinned": 2.5e10, "load": 1.5, "precisions": COSTS},
}
IDLE = {**DEVICE, "name": "cuda:1", "used": False, "budget": None, "measured": None}
FOUND: dict[str, Any] = {
    "libraries": {"torch": "2.13.0", "rich": ""},
    "devices": [DEVICE, IDLE],
    "data": {"folder": "/d", "usable": True, "in_use": False, "free": 5_000_000_000, "budget": None},
    "network": {"host": "::", "port": 7, "port_free": True, "tcp_loopback": True, "udp_loopback": False},
    "faults": ["Something is wrong; mend it."],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NodeConfig, bool]]:
    """What the engine was asked for; it finds FOUND."""
    seen: list[tuple[NodeConfig, bool]] = []

    def examine(config: NodeConfig, *, again: bool = False) -> dict[str, Any]:
        seen.append((config, again))
        return FOUND

    monkeypatch.setattr(checkup, "examine", examine)
    monkeypatch.setattr(doctor, "prepare", lambda settings: None)
    return seen


def test_a_table_of_all_of_it(asked: list[tuple[NodeConfig, bool]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    [gpu] = [line.split() for line in lines if "82 multiprocessors" in line and "cuda:0" in line]
    assert gpu[-6:] == ["900", "GB/s", "6", "GB/s", "25", "GB/s"] and "16 GB" in " ".join(gpu)
    assert any("cuda:1" in line and "not used" in line for line in lines)
    [f32] = [line for line in lines if " F32 " in line]
    for figure in ("40 GB/s", "100 ms/token", "2,000 GFLOP/s"):
        assert figure in f32
    assert any("BF16" in line and "cuda:0 lacks it." in line for line in lines)
    assert any("12 GB for weights, 4 GB for KV-caches" in line for line in lines)
    assert any("TCP works, UDP does not work" in line for line in lines)
    assert any("rich missing" in line for line in lines)
    assert "cuda:0 was measured on a busy machine" in lines[-2] and "cuda:1 was" not in "".join(lines)
    assert lines[-1] == "✗ Something is wrong; mend it."


def test_options_reach_the_node(
    asked: list[tuple[NodeConfig, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(["doctor", "--json", "--again", "--devices", "cuda,cpu", "--vram", "2GB", "--data", "/d", "--threads", "1"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(FOUND))
    assert asked == [(NodeConfig(data=Path("/d"), devices=("cuda:0", "cpu"), vram=2 * 10**9, threads=1), True)]
    recipe = tmp_path / "model.toml"
    recipe.write_text('magnet = "magnet:?xt=urn:btih:ab"\n[node]\nport = 5\ndevices = ["cpu"]\nram = "1GB"\n')
    cli.run(["doctor", str(recipe), "--ram", "3GB", "--data", "/d"])
    assert asked[1] == (NodeConfig(data=Path("/d"), port=5, devices=("cpu",), ram=3 * 10**9), False)


def test_a_wrong_option_is_one_sentence(
    asked: list[tuple[NodeConfig, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor", "--devices", "gpu"]) == 1
    assert "--devices must be" in capsys.readouterr().err and not asked


def test_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torrentlm", "doctor", "--json", "--port", "0", "--host", "127.0.0.1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    for data in (tmp_path, tmp_path):
        run = subprocess.run(
            [*command, "--data", str(data)], capture_output=True, text=True, timeout=200, env=environment
        )
        found = json.loads(run.stdout)
        assert run.returncode == bool(found["faults"]), run.stderr
        assert "Traceback" not in run.stderr and found["devices"][0]["name"] == "cpu"
        assert found["devices"][0]["units"] == available_cores()
        assert (tmp_path / "devices.json").exists()
