"""``torrentlm generate``: one prompt, one answer, made for scripts."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import Patience, prepare, waiting
from torrentlm.cli.options import (
    SAMPLING,
    adapter_option,
    client_options,
    model_argument,
    sampling_options,
    settings_of,
)
from torrentlm.records import MAX_STOP_BYTES, MAX_STOPS

MAX_PROMPT = 4 << 20
"""Bytes read from standard input; more than any context holds."""


@click.command(short_help="Answer one prompt.")
@model_argument
@click.option(
    "--prompt", required=True, metavar="TEXT", help='The text to continue, as it is; "-" reads standard input.'
)
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@adapter_option
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@client_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end; see docs/cli.md.")
def command(
    model: str, prompt: str, chat: bool, adapter: str | None, stop: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Continue a prompt with MODEL and print what comes, as it comes."""
    settings = settings_of(model, options, client=True)
    stop = tuple(text.checked(end, "--stop") for end in stop)
    if not all(0 < len(end.encode()) <= MAX_STOP_BYTES for end in stop) or len(stop) > MAX_STOPS:
        raise click.BadParameter(f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes", param_hint="--stop")
    if prompt == "-":
        prompt = text.read(lambda: sys.stdin.read(MAX_PROMPT), "Standard input")
    else:
        prompt = text.checked(prompt, "--prompt")
    how = {name: options[name] for name in SAMPLING} | {"chat": chat, "adapter": adapter, "stop": stop}
    prepare(settings)
    from torrentlm.api import connect

    with waiting("Looking for holders …"):
        connection = connect(model, settings=settings, on_event=Patience())
    with connection as swarm:
        if as_json:
            swarm.generate(prompt, **how)
            click.echo(json.dumps(as_object(swarm.last)))
            return
        for piece in swarm.generate(prompt, stream=True, **how):
            click.echo(piece, nl=False)
        click.echo()


def as_object(result: Any) -> dict[str, object]:
    """A GenerationResult as ``--json`` prints it."""
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "tokens_per_second": round(result.tokens_per_second, 3),
        "time_to_first_token_s": round(result.time_to_first_token_s, 4),
        "route": [{"peer": hop.peer, "first": hop.first, "last": hop.last} for hop in result.route],
        "finish": result.finish,
    }
