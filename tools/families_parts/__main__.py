"""The front of ``tools/families``: a tiny model of every family that transformers knows, split and compared.

Prints a table or, with ``--json``, one object: the counts and the rows. ``--write`` makes docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from check import OUTCOMES, Row
from report import page, show
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sweep import entries, rows

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/families", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", metavar="NAME,…", help="these model types, classes, kinds, or KIND:TYPE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="write the table to docs/families.md")
    given = parser.parse_args()
    names = frozenset(given.only.split(",")) if given.only else frozenset()
    wanted = entries(names)
    if unknown := names - {part for row in wanted for part in (*row, f"{row[0]}:{row[1]}")}:
        parser.error(f"transformers maps nothing called {', '.join(sorted(unknown))}")
    if given.write and names:
        parser.error("--write needs all rows: leave --only out")
    found = sweep(wanted)
    counts = Counter(row.outcome for row in found)
    if given.json:
        print(json.dumps({**{name: counts[name] for name in OUTCOMES}, "rows": [asdict(row) for row in found]}))
    else:
        show(found)
    if given.write:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0


def sweep(wanted: list[tuple[str, str, str]]) -> list[Row]:
    """All rows, with a bar where somebody watches."""
    found = []
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Refreshed by hand: a thread that draws would be forked into the children half-way through a line.
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(wanted))
        for row in rows(wanted):
            found.append(row)
            bar.update(task, advance=1, description=f"{row.name} {row.outcome}", refresh=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
