"""``torrentlm doctor``: what this machine can do for a swarm, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import prepare, waiting
from torrentlm.cli.options import machine_options, machine_settings

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 200
"""Columns where nobody's terminal says how many: nothing is cut then."""
BUSY = 1.0
"""Processes that wanted each core when a device was measured."""


@click.command(short_help="Show devices, what each precision costs, and what is wrong.")
@click.argument("model", required=False)
@click.option("--again", is_flag=True, help="Measure the devices again, whatever is remembered.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; see docs/cli.md.")
@machine_options
def command(model: str | None, again: bool, as_json: bool, **options: object) -> int:
    """Show this machine's devices and what they can do, what a node would take of it, and what is wrong.

    With MODEL, a model.toml, the node is the one that its [node] describes. Contacts nothing beyond this machine. Ends
    with 1 if anything is wrong.
    """
    settings = machine_settings(model, options)
    prepare(settings)
    with waiting("Looking at this machine, some seconds the first time …"):
        from torrentlm.node.checkup import examine

        found = examine(settings.node, again=again)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)
    return 1 if found["faults"] else 0


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    for part in (_devices(found), _precisions(found), _node(found)):
        console.print(part)
        console.print()
    for device in found["devices"]:
        if (device["measured"] or {"load": 0})["load"] >= BUSY:
            click.echo(f"({device['name']} was measured on a busy machine; --again on an idle one will show more)")
    for fault in found["faults"]:
        click.echo(f"✗ {fault}")
    if not found["faults"]:
        click.echo("✓ Nothing is wrong.")


def _devices(found: dict[str, Any]) -> RenderableType:
    headings = ("device", "what it is", "memory", "free", "budget", "read", "upload", "pinned")
    return _table(headings, (_device_row(device) for device in found["devices"]))


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    units = {"cpu": "core", "mps": "unit"}.get(device["backend"], "multiprocessor")
    known = [device["model"], *([text.count(device["units"], units)] if device["units"] else []), *device["features"]]
    measured = device["measured"] or {}
    rates = (text.rate(measured[name]) if measured.get(name) else "–" for name in ("read", "upload", "pinned"))
    return (
        device["name"],
        ", ".join(known),
        text.size(device["memory_total"]),
        text.size(device["memory_free"]),
        text.size(device["budget"]) if device["used"] else "not used",
        *rates,
    )


def _precisions(found: dict[str, Any]) -> RenderableType:
    headings = ("device", "precision", "bytes/weight", "decoding", "1B weights", "prompt", "error")
    return _table(headings, (row for device in found["devices"] for row in _precision_rows(device)))


def _precision_rows(device: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for cost in (device["measured"] or {"precisions": ()})["precisions"]:
        if cost["lacking"]:
            yield device["name"], cost["precision"], "–", cost["lacking"], "", "", ""
        else:
            yield (
                device["name"],
                cost["precision"],
                f"{cost['bytes_per_weight']:.3g}",
                text.rate(cost["decode"] * cost["bytes_per_weight"]),
                f"{1e12 / cost['decode']:.3g} ms/token",
                f"{2 * cost['prompt'] / 1e9:,.0f} GFLOP/s",
                f"{cost['error']:.1g}",
            )


def _node(found: dict[str, Any]) -> RenderableType:
    data, network = found["data"], found["network"]
    budget = "all of it" if data["budget"] is None else text.size(data["budget"])
    port = "in use" if not network["port_free"] else "free"
    if data["in_use"]:
        port += "; a node has the data folder"
    works = {True: "works", False: "does not work"}
    rows = [
        (f"budgets of {device['name']}", f"{text.size(device['weights_budget'])} for weights,"
         f" {text.size(device['kv_budget'])} for KV-caches")
        for device in found["devices"]
        if device["used"]
    ]  # fmt: skip
    rows += [
        ("data folder", data["folder"] + ("" if data["usable"] else " (cannot be used)")),
        ("disk", f"{text.size(data['free'])} free, to use: {budget}"),
        ("port", f"{network['port']} on {network['host']}: {port}"),
        ("loopback", ", ".join(f"{kind.upper()} {works[network[f'{kind}_loopback']]}" for kind in ("tcp", "udp"))),
        ("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in found["libraries"].items())),
    ]
    return _table((), rows)


def _table(headings: tuple[str, ...], rows: Any) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if headings else None, pad_edge=False, show_header=bool(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
