"""``torrentlm publish``: make a model's blocks and torrents in the data folder, and print its magnet."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import prepare
from torrentlm.cli.options import model_argument, publish_options, publisher_options, settings_of
from torrentlm.config import Recipe, Settings
from torrentlm.errors import ConfigError

if TYPE_CHECKING:
    from torrentlm.publish.published import Published
    from torrentlm.swarm.store import Store

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
    if settings.recipe is None and not settings.adapters:
        raise ConfigError("A magnet names what is published already; give torrentlm publish a model.toml.")
    prepare(settings)
    with _view(as_json) as show:
        events = _publish(settings, show)
    for event in events:
        click.echo(json.dumps(event) if as_json else event["magnet"])
        if not as_json and event.get("left_out"):
            click.echo(f"torrentlm: {text.left_out(event['left_out'])}", err=True)


def _publish(settings: Settings, show: Callable[[Event], None]) -> list[Event]:
    """The model's event, if it is published here, and one for each adapter."""
    from torrentlm.manifest.magnet import Magnet
    from torrentlm.publish.adapter import adapter_event, publish_adapter
    from torrentlm.publish.published import stored_manifest
    from torrentlm.swarm.store import Store

    with Store(settings.node.data) as store:
        if settings.recipe is not None:
            published, event = _publish_model(settings, settings.recipe, store, show)
            magnet, manifest, events = published.magnet, published.manifest, [event]
        else:
            magnet = Magnet.parse(settings.magnet or "")
            base = stored_manifest(magnet, store.data)
            if base is None:
                raise ConfigError(
                    f"{store.data} does not have the model that the adapters are for: torrentlm seed with this "
                    "model.toml fetches it and publishes them"
                )
            manifest, events = base, []
        adapters = (publish_adapter(recipe, magnet, manifest, store) for recipe in settings.adapters)
        return [*events, *map(adapter_event, adapters)]


def _publish_model(
    settings: Settings, recipe: Recipe, store: Store, show: Callable[[Event], None]
) -> tuple[Published, Event]:
    from torrentlm.publish.run import Pace, published_event, run

    pace = Pace(time.monotonic)
    begun = False

    def progress(done: int, total: int, what: str) -> None:
        nonlocal begun
        begun = begun or done > 0
        if (event := pace(done, total, what)) is not None:
            show(event)

    try:
        published = run(recipe, store, progress, settings.node.allow_code)
        return published, published_event(published)
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
