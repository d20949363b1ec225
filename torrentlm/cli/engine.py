"""Before the engine: it is heavy to import, so a subcommand imports it itself, when it needs it, after ``prepare``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from torrentlm.config import Settings


def prepare(settings: Settings) -> None:
    """Set the environment that torch reads at import; ``torrentlm.api`` may be imported after this, and not before."""
    from torrentlm.compute.threads import prepare_environment

    prepare_environment(settings.node.threads)


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """A spinner with ``message`` where stderr is a terminal; nothing anywhere else."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


class Patience:
    """Takes a client's events and says on a terminal's stderr what it waits for, each reason once in a row."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, event: dict[str, Any]) -> None:
        why = str(event.get("why", ""))
        if event.get("event") == "waiting" and why != self._said and sys.stderr.isatty():
            self._said = why
            click.secho(f"({why})", err=True, dim=True)
