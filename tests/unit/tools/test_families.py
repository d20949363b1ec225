"""``tools/families`` tells exact from refused from wrong: on a few families, and on outcomes made to order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "families_parts"
SAMPLE = {
    "causal:llama": "exact",
    "causal:gemma2": "exact",
    "causal:whisper": "exact",
    "causal:mamba": "refused",
    "seq2seq:t5": "refused",
    "causal:musicgen": "unbuildable",
}


def run(program: list[str]) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL)}
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run([str(TOOL), "--json", "--only", ",".join(SAMPLE)]))
    return answer


def test_each_family_ends_as_it_should(found: dict[str, Any]) -> None:
    rows = {f"{row['kind']}:{row['name']}": row for row in found["rows"]}
    assert {name: row["outcome"] for name, row in rows.items()} == SAMPLE
    for name, row in rows.items():
        assert bool(row["reason"]) == (row["outcome"] != "exact"), name
    assert {name: found[name] for name in ("exact", "refused", "wrong", "unbuildable")} == {
        name: list(SAMPLE.values()).count(name) for name in ("exact", "refused", "wrong", "unbuildable")
    }


def test_exact_means_that_everything_was_compared(found: dict[str, Any]) -> None:
    checks = {row["name"]: set(row["checks"]) for row in found["rows"]}
    assert checks["llama"] == {"prefill", "greedy", "padded", "chunked"}
    assert checks["gemma2"] == {"prefill", "greedy", "padded", "window", "chunked"}


BROKEN = """
import json, sys
from dataclasses import asdict
import check, parts, sweep

def scaled(model, folder, real=parts.thirds):
    with __import__("torch").no_grad():
        model.lm_head.weight.mul_(1.001)
        found = real(model, folder)
        model.lm_head.weight.div_(1.001)
    return found

def crash(model, folder):
    __import__("os").abort()

def hang(model, folder):
    __import__("time").sleep(600)

rows = []
for replacement in (scaled, crash, hang):
    check.thirds = replacement
    sweep.SECONDS = 4 if replacement is hang else 60
    rows += [asdict(row) for row in sweep.rows([("causal", "llama", "LlamaForCausalLM")])]
print(json.dumps(rows))
"""


def test_what_differs_crashes_or_hangs_is_wrong() -> None:
    differs, crashed, hung = json.loads(run(["-c", BROKEN]))
    assert {row["outcome"] for row in (differs, crashed, hung)} == {"wrong"}
    assert "prefill: differ by" in differs["reason"] and "logits differ by" in differs["checks"]["greedy"]
    assert "crashed" in crashed["reason"]
    assert "longer than 4 s" in hung["reason"]


def test_a_name_that_nothing_has() -> None:
    command = [sys.executable, str(TOOL), "--only", "no-such-thing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no-such-thing" in done.stderr
