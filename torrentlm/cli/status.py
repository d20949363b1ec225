"""``torrentlm status``: what the node that uses a data folder has in memory, on disk and under way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from torrentlm.cli import text
from torrentlm.config import default_data
from torrentlm.errors import ConfigError
from torrentlm.node.status import EVERY_S, read_status
from torrentlm.records import spans_of

BAR = 20


@click.command(short_help="Show what a running node holds.")
@click.option("--data", metavar="FOLDER", help="The node's data folder.")
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with --watch one a line; see docs/cli.md.")
def command(data: str | None, watch: bool, as_json: bool) -> None:
    """Show the budgets of the node that runs on this machine, and what is used of them."""
    folder = Path(data).expanduser() if data else default_data()
    if as_json:
        click.echo(json.dumps(_read(folder)))
        while watch:
            time.sleep(EVERY_S)
            click.echo(json.dumps(_read(folder)))
        return
    console = Console()
    if not watch:
        console.print(_shown(_read(folder)))
        return
    with Live(_shown(_read(folder)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(EVERY_S)
            live.update(_shown(_read(folder)), refresh=True)


def _read(folder: Path) -> dict[str, Any]:
    status = read_status(folder)
    if status is None:
        raise ConfigError(
            f"No node runs with the data folder {folder}: start one with torrentlm seed, or name its --data."
        )
    return status


def _shown(status: dict[str, Any]) -> RenderableType:
    memory = Table(title=f"Node at {status['endpoint']}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "used", "budget", ""):
        memory.add_column(column, no_wrap=True)
    for device in status["devices"]:
        several = len(status["devices"]) > 1
        memory.add_row(f"{device['device']}: {device['name']}" if several else device["name"])
        if device.get("lost"):
            memory.add_row(f"  {device['lost']}")
            continue
        for what in ("weights", "kv"):
            label = {"weights": "weights", "kv": "KV-caches"}[what]
            memory.add_row(f"  {label}", *_share(device[what]["used"], device[what]["budget"]))
        memory.add_row("  in use by sessions", text.size(device["weights"]["pinned"]))
        if (offloaded := device.get("offloaded", {})).get("budget"):
            memory.add_row("  offloaded to RAM", *_share(offloaded["used"], offloaded["budget"]))
    memory.add_row("disk", *_share(status["disk"]["used"], status["disk"]["budget"]))
    memory.add_row("  fetched ahead", text.size(status["prefetched"]))
    rates = status["rates"]
    memory.add_row("sessions", str(status["sessions"]))
    memory.add_row("transfers", f"↓ {text.rate(rates['download'])}", f"↑ {text.rate(rates['upload'])}")
    models = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "in memory", "offered", "on disk", "fetching", "precision", "peers"):
        models.add_column(column)
    for model in status["models"]:
        blocks = [", ".join(map(str, spans_of(model[key]))) for key in _BLOCKS]
        models.add_row(model["name"], *blocks, model["precision"], str(model["peers"]))
    return Group(memory, "", models)


_BLOCKS = ("resident", "offered", "held", "fetching")


def _share(used: int, budget: int | None) -> tuple[str, str, str]:
    if not budget:
        return text.size(used), "", ""
    filled = min(BAR, round(BAR * used / budget))
    return text.size(used), text.size(budget), "█" * filled + "░" * (BAR - filled)
