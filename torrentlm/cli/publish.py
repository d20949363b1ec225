"""``torrentlm publish``: make a model's blocks and torrents in the data folder, and print its magnet."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import prepare
from torrentlm.cli.options import model_argument, publish_options, publisher_options, settings_of
from torrentlm.config import Recipe, Settings
from torrentlm.errors import ConfigError

Event = dict[str, Any]


@click.command(short_help="Publish a model into the data folder and print its magnet.")
@model_argument
@publisher_options
@publish_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, an event each; see docs/cli.md.")
def command(model: str, as_json: bool, **options: object) -> None:
    """Publish what MODEL, a model.toml, says, and print the magnet; seed MODEL with the same folder serves it then.

    A run that was stopped or killed is taken up where it was.
    """
    settings = settings_of(model, options)
    if settings.recipe is None:
        raise ConfigError("A magnet names what is published already; give torrentlm publish a model.toml.")
    prepare(settings)
    with _view(as_json) as show:
        done = _publish(settings, settings.recipe, show)
    click.echo(json.dumps(done) if as_json else done["magnet"])
    if not as_json and done["left_out"]:
        click.echo(f"(left out: {text.count(len(done['left_out']), 'tensor')} that no block reads)", err=True)


def _publish(settings: Settings, recipe: Recipe, show: Callable[[Event], None]) -> Event:
    from torrentlm.publish.run import Pace, published_event, run
    from torrentlm.swarm.store import Store

    pace = Pace(time.monotonic)
    begun = False

    def progress(done: int, total: int, what: str) -> None:
        nonlocal begun
        begun = begun or done > 0
        if (event := pace(done, total, what)) is not None:
            show(event)

    try:
        with Store(settings.node.data) as store:
            return published_event(run(recipe, store, progress, settings.node.allow_code))
    except KeyboardInterrupt:
        if begun:
            click.echo("(stopped; the same command goes on from here)", err=True)
        raise


@contextlib.contextmanager
def _view(as_json: bool) -> Iterator[Callable[[Event], None]]:
    if as_json:
        yield lambda event: click.echo(json.dumps(event))
    elif sys.stderr.isatty():
        from torrentlm.cli.live import progress_view

        with progress_view() as show:
            yield show
    else:
        yield lambda event: None
