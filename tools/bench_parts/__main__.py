"""The front of ``tools/bench``: runs one part, prints a table or, with ``--json``, one object.

A part is a file beside this one with ``run(runs: int) -> dict``. The dict has ``ours``, ``reference`` and ``ratio``
(medians; ``unit`` says of what), ``runs`` (what is behind them) and whatever else the part measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

PARTS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measure one part against its reference.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs to take the median of (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    result: dict[str, Any] = importlib.import_module(options.part).run(runs=options.runs)
    if options.json:
        print(json.dumps({"part": options.part, **result}))
    else:
        show(options.part, result)
    return 0


def show(part: str, result: dict[str, Any]) -> None:
    """The three figures first, the rest below."""
    unit = f" {result['unit']}" if "unit" in result else ""
    print(f"{part}: ours {figure(result['ours'])}{unit}, reference {figure(result['reference'])}{unit}", end="")
    print(f", ratio {figure(result['ratio'])}")
    for name, value in result.items():
        if name not in ("ours", "reference", "ratio", "unit", "runs"):
            print(f"  {name.replace('_', ' ')}: {figure(value)}")
    if "runs" in result:
        print(f"  runs: {figure(result['runs'])}")


def figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "; ".join(map(figure, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(item)}" for name, item in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
