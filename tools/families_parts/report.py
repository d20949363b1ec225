"""The rows as people read them: a table on the terminal, and docs/families.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from check import OUTCOMES, Row
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"exact": "green", "refused": "yellow", "wrong": "bold red", "unbuildable": "dim"}
KINDS = {"causal": "Causal language models", "masked": "Masked language models", "seq2seq": "Encoder-decoders"}

HEAD = """\
# Families

What becomes of every class that transformers maps for language modelling. `tools/families --write` makes this page: it
builds a tiny random model of each, cuts it into three, and compares the parts with the whole in fp32: the logits behind
a prompt to the bit, {tokens} greedy tokens, a left-padded batch of two, a prompt longer than the sliding window where
there is one, a prompt in chunks where the model itself can do that. Of masked models only logits are compared. Each is
saved, published and held as any checkpoint is; the three parts run in one process, every border in its wire form (whole
sessions over holder processes are what `tests/swarm/test_shapes.py` runs, for a few families). Logits of greedy, padded
and chunked text may differ by 1e-4 of the largest, the tokens by none.

A few models do not agree with themselves. What some decode step by step differs from what their forward gives for the
whole text, so that no split could give both: with `replay = true` in the recipe they are held to the latter, which is
`generate(use_cache=False)`. Others give for a prompt in parts something else than for the prompt at once: with
`chunks = false` holders get it whole. Publishing refuses both without the hint, which is tried for each; the table says
which models have one. It looks at 40 tokens, and at the model as if its windows, and whatever else it counts tokens
by, were a few tokens long.

torch {torch}, transformers {transformers}.

| outcome | rows | meaning |
| --- | --- | --- |
"""
MEANING = {
    "exact": "nothing differed by more than that",
    "refused": "the splitter says that it cannot, and why",
    "wrong": "it was split and differed, or broke: a bug",
    "unbuildable": "transformers does not build or run the tiny model by itself",
}


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows ended in which way."""
    found = Counter(row.outcome for row in rows)
    return {name: found[name] for name in OUTCOMES}


def show(rows: Sequence[Row]) -> None:
    """Print a table; the counts last."""
    console = Console()
    table = Table("name", "class", "outcome", "reason", box=None)
    for row in rows:
        colour = COLOURS[row.outcome]
        table.add_row(row.name, row.model, f"[{colour}]{row.outcome}[/]", escape(_remark(row)))
    console.print(table)
    console.print(", ".join(f"{name} {count}" for name, count in counts(rows).items()))


def page(rows: Sequence[Row]) -> str:
    """docs/families.md."""
    versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    lines = [HEAD.format(tokens=24, **versions).rstrip("\n")]
    lines += [f"| {name} | {count} | {MEANING[name]} |" for name, count in counts(rows).items()]
    for kind, title in KINDS.items():
        lines += ["", f"## {title}", "", "| name | class | outcome | reason |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {row.name} | {row.model} | {row.outcome} | {_cell(_remark(row))} |" for row in rows if row.kind == kind
        ]
    return "\n".join(lines) + "\n"


def _remark(row: Row) -> str:
    hints = ", ".join(f"{name} = {json.dumps(value)}" for name, value in row.hints.items())
    return "; ".join(part for part in (hints and f"with {hints}", row.reason) if part)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
