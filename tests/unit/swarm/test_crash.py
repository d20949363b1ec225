"""A process that fills and empties a store is killed two hundred times; what the store says stays true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_killed_at_any_instant(tmp_path: Path) -> None:
    script = Path(__file__).with_name("crash.py")
    command = [sys.executable, str(script), str(tmp_path / "data"), str(KILLS), "1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    assert seen["kills"] == KILLS
    assert seen["over"] == 0
    # It was caught with files, and with unfinished ones: the kills were not all too early.
    assert seen["held"] > KILLS
    assert seen["unfinished"] > 10
