"""``torrentlm embed``: texts to vectors, by an encoder in the swarm."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import Patience, prepare, waiting
from torrentlm.cli.options import adapter_option, client_options, model_argument, settings_of

MAX_INPUT = 16 << 20
"""Bytes read from standard input."""
SHOWN = 4


@click.command(short_help="Turn texts into vectors.")
@model_argument
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Repeatable. Without any, each line of standard input is one.",
)
@adapter_option
@client_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; see docs/cli.md.")
def command(model: str, texts: tuple[str, ...], adapter: str | None, as_json: bool, **options: Any) -> None:
    """Embed texts with MODEL, an encoder; longer texts than it takes are cut."""
    settings = settings_of(model, options, client=True)
    wanted = [text.checked(one, "--text") for one in texts]
    if not wanted:
        wanted = text.read(lambda: sys.stdin.read(MAX_INPUT), "Standard input").splitlines()
    if not wanted:
        raise click.UsageError("there is nothing to embed: give --text TEXT, or lines on standard input")
    prepare(settings)
    from torrentlm.api import connect

    with waiting("Looking for holders …"):
        connection = connect(model, settings=settings, on_event=Patience())
    with connection as swarm:
        vectors = swarm.embed(wanted, adapter=adapter)
    if as_json:
        rows = [{"text": one, "embedding": vector.tolist()} for one, vector in zip(wanted, vectors, strict=True)]
        click.echo(json.dumps({"width": vectors.shape[1], "embeddings": rows}))
        return
    for one, vector in zip(wanted, vectors, strict=True):
        first = " ".join(f"{value:+.4f}" for value in vector[:SHOWN])
        click.echo(f"{one[:60]!r}: {len(vector)} numbers, {first} …")
