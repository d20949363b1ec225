"""``tools/gpu_check`` where there is no GPU: one sentence, and its tests tried out on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "gpu_parts"
no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU: see tools/gpu_check"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@no_gpu
def test_no_gpu_is_one_sentence() -> None:
    done = run()
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("gpu_check: No GPU was found on this machine, so the tests in tests/gpu have not run.")


@no_gpu
def test_a_device_that_is_not_there() -> None:
    done = run("--device", "cuda:0")
    assert done.returncode == 1 and "There is no device cuda:0 here" in done.stderr and "Traceback" not in done.stderr


@no_gpu
def test_the_tests_are_not_collected_without_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "no tests ran" in done.stdout


def test_the_tests_themselves_on_the_processor() -> None:
    done = run("--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    [result] = json.loads(done.stdout)["devices"]
    assert result["device"] == "cpu" and result["passed"]
    rows = {row["precision"]: row for row in result["rows"]}
    errors = [rows[precision]["error"] for precision in ("F32", "F16", "BF16", "INT8", "INT4")]
    assert errors[0] == 0.0 and errors == sorted(set(errors)) and len(rows) == len(errors)
    assert all(row["ms_per_block"] > 0 and row["GB_s"] > 0 for row in rows.values())
