"""``torrentlm seed``: publish or join a model, hold blocks of it, and show how that goes."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import click

from torrentlm.cli.engine import prepare
from torrentlm.cli.options import model_argument, node_options, publish_options, settings_of

Event = dict[str, object]


@click.command(short_help="Publish or join a model, hold blocks and serve them.")
@model_argument
@node_options
@publish_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, an event each; see docs/cli.md.")
def command(model: str, as_json: bool, **options: object) -> int:
    """Publish or join MODEL, hold what fits of it, and serve it until Ctrl-C."""
    settings = settings_of(model, options)
    with stop_on_signals() as stop, _view(as_json) as show:
        prepare(settings)
        from torrentlm.api import serve

        if not stop.is_set():
            serve(settings, on_event=show, stop=stop)
    return stop.status


class Stop(threading.Event):
    """Set by the first SIGINT or SIGTERM; ``status`` is the exit status that belongs to it."""

    status = 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into ``stop.set()``, a second one into a KeyboardInterrupt for whoever cannot wait."""
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.status = 128 + signal.SIGINT if number == signal.SIGINT else 0
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _view(as_json: bool) -> Iterator[Callable[[Event], None]]:
    if as_json:
        yield _show_json
    elif sys.stdout.isatty():
        from torrentlm.cli.live import live_view

        with live_view() as show:
            yield show
    else:
        from torrentlm.cli.swarm_view import SwarmView

        view = SwarmView()
        yield lambda event: _show_line(view.line_for(event))


def _show_json(event: Event) -> None:
    click.echo(json.dumps(event))


def _show_line(line: str | None) -> None:
    if line is not None:
        click.echo(line)
