"""The front of ``tools/bench``: runs one part, prints a table or, with ``--json``, one object.

A part is a file beside this one with ``run(runs: int, ...) -> dict``; its other parameters are options of the command
line, with the same defaults (flags, if they are bools). The dict has ``ours``, ``reference`` and ``ratio``
(medians; ``unit`` says of what), ``runs`` (what is behind them) and whatever else the part measures.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # netlab_parts

PARTS = sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[a-z]*.py"))
RUNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measure one part against its reference.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="|".join(PARTS))
    for name in PARTS:
        add_part(parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter), name)
    given = vars(parser.parse_args())
    part, run, as_json = given.pop("part"), given.pop("run"), given.pop("json")
    if given["runs"] < 1:
        parser.error("--runs must be at least 1")
    result: dict[str, Any] = run(**given)
    if as_json:
        print(json.dumps({"part": part, **result}))
    else:
        show(part, result)
    return 0


def add_part(parser: argparse.ArgumentParser, name: str) -> None:
    run = importlib.import_module(name.replace("-", "_")).run
    runs, *options = inspect.signature(run).parameters.values()
    default = RUNS if runs.default is runs.empty else runs.default
    parser.set_defaults(run=run)
    parser.add_argument("--runs", type=int, default=default, help="runs to take the median of")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for option in options:
        if isinstance(option.default, bool):
            parser.add_argument(f"--{option.name}", action="store_true", help=" ")
            continue
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default, help=" ")


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
