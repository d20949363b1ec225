"""The live status of ``torrentlm seed`` on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torrentlm.cli import text
from torrentlm.cli.swarm_view import SwarmView

SHOWN_PEERS = 12


@contextlib.contextmanager
def live_view(console: Console | None = None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a status that follows the events given to the yielded function; what is left at the end stays on screen."""
    view = SwarmView()
    console = console or Console()
    with Live(
        get_renderable=lambda: render(view),
        console=console,
        refresh_per_second=4,
        redirect_stderr=sys.stderr.isatty(),  # else it is a file, which the display does not disturb
    ) as live:

        def show(event: dict[str, Any]) -> None:
            known = {view.magnet, *view.adapters.values()}
            view.apply(event)
            for magnet in (view.magnet, *view.adapters.values()):
                if magnet and magnet not in known:
                    # Above the display and in one piece, so that it can be copied.
                    live.console.print(magnet, soft_wrap=True, highlight=False, markup=False)

        yield show


def render(view: SwarmView) -> RenderableType:
    """The whole display for one moment."""
    title = Text(view.name or "torrentlm", style="bold")
    if view.port:
        title.append(f"  port {view.port}", style="dim")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row("blocks", _blocks(view))
    if view.proof:
        rows.add_row("proof", Text(view.proof))
    if view.warning:
        rows.add_row("warning", Text(view.warning))
    if view.waiting:
        rows.add_row("waiting", Text(view.waiting))
    if view.what:
        rows.add_row(view.what, _bar(view) if view.total > 1 else "…")
    rows.add_row("sessions", str(view.sessions))
    rows.add_row("traffic", f"↓ {text.rate(view.download)}   ↑ {text.rate(view.upload)}")
    rows.add_row("peers", _peers(view))
    return Group(title, rows, Text("Ctrl-C stops", style="dim"))


def _blocks(view: SwarmView) -> str:
    of_all = f" of {view.blocks_total}" if view.blocks_total else ""
    if view.ready:
        return f"serving {text.blocks(view.blocks)}{of_all}"
    return "starting" + (f"; the model has {view.blocks_total}" if of_all else "")


@contextlib.contextmanager
def progress_view(console: Console | None = None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a bar that follows the ``progress`` events given to that function, on stderr; it vanishes in the end."""
    view = SwarmView()

    def picture() -> RenderableType:
        what = Text(view.what or "starting", style="dim")
        return Group(what, _bar(view)) if view.total > 1 else what

    with Live(
        get_renderable=picture, console=console or Console(stderr=True), refresh_per_second=4, transient=True
    ):  # fmt: skip
        yield view.apply


def _bar(view: SwarmView) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(total=max(view.total, 1), completed=view.done, width=40),
        f"{text.size(view.done)} of {text.size(view.total)}",
        text.rate(view.rate) if view.rate else "",
        f"{text.duration(view.left)} left" if view.left is not None else "",
    )
    return row


def _peers(view: SwarmView) -> RenderableType:
    if not view.peers:
        return "none yet"
    lines = [f"{peer}  {holds}" for peer, holds in list(view.peers.items())[:SHOWN_PEERS]]
    if len(view.peers) > SHOWN_PEERS:
        lines.append(f"and {len(view.peers) - SHOWN_PEERS} more")
    return Text("\n".join(lines))
