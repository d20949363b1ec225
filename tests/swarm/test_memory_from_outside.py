"""What the system says of a holder's memory, through a whole run, beside what the holder says of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def test_a_holder_takes_little_beside_weights_and_caches() -> None:
    """All of SmolLM2, made small while it is loaded, and two sessions at once, within the budgets that it says."""
    options = ("--precision", "INT8", "--ram", "1GB", "--sessions", "2", "--tokens", "8", "--idle", "1")
    done = subprocess.run(
        [BENCH, "memory", "--json", *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] > 50
    assert found["said_MB"] > 130  # it had all of the weights, and said so
    assert found["said_MB"] <= found["budget_MB"] <= 1000
    assert found["ratio"] <= 1
