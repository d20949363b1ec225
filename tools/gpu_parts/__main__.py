"""The front of ``tools/gpu_check``: runs tests/gpu on every GPU, prints a table of what they measured.

Ends with 1 where there is no GPU or a test fails. ``--device cpu`` tries the tests out where there is none; its figures
say nothing of any GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torrentlm.cli import text
from torrentlm.compute.devices import DeviceInfo, choose, find_devices, unused_hardware
from torrentlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
SECONDS = 1800


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_check", description="Run all tests that need a GPU.")
    parser.add_argument("--device", help="one device, such as cuda:1; all GPUs otherwise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    found = find_devices()
    try:
        devices = choose([given.device] if given.device else None, found)
    except ConfigError as error:
        return fail(str(error))
    if not given.device and not any(device.accelerates for device in devices):
        known = [device.problem for device in found if device.problem] or [unused_hardware()]
        return fail(f"No GPU was found on this machine, so the tests in tests/gpu have not run. {known[0]}".strip())
    results = [check(device) for device in devices]
    if given.json:
        print(json.dumps({"devices": results}))
    else:
        for result in results:
            show(result)
    return 0 if all(result["passed"] for result in results) else 1


def check(device: DeviceInfo) -> dict[str, Any]:
    """Run the tests on one device; what they print goes to stderr."""
    with tempfile.TemporaryDirectory(prefix="torrentlm-gpu-") as folder:
        rows = Path(folder, "rows.json")
        environment = os.environ | {"TORRENTLM_TEST_GPU": device.name, "TORRENTLM_TEST_GPU_ROWS": str(rows)}
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            status = 1
        measured = json.loads(rows.read_text()) if rows.exists() else []
    return {
        "device": device.name,
        "model": device.model,
        "driver": device.driver,
        "passed": status == 0,
        "rows": measured,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['device']}: {result['model']}, {result['driver']}: {'passed' if result['passed'] else 'FAILED'}")
    columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
    if columns:
        print(text.table([columns, *([cell(row.get(name)) for name in columns] for row in result["rows"])]))


def cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def fail(sentence: str) -> int:
    print(f"gpu_check: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
