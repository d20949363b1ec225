"""The ``torrentlm`` command: finds the subcommand, and turns every way that it can end into a sentence and a status."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

import click

from torrentlm.errors import TorrentLMError

SUBCOMMANDS = ("seed", "publish", "convert", "chat", "generate", "embed", "inspect", "status", "doctor", "demo")
INTERRUPTED = 130
"""What a shell gives for a command that Ctrl-C ended."""


class _Subcommands(click.Group):
    """Imports a subcommand's file when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        command = importlib.import_module(f"torrentlm.cli.{name}").command
        assert isinstance(command, click.Command)  # noqa: S101
        return command


@click.group(
    cls=_Subcommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="docs/model-toml.md explains model.toml and the TORRENTLM_* variables.",
)
@click.version_option(package_name="torrentlm", message="%(prog)s %(version)s")
def torrentlm() -> None:
    """Store and run large language models in a BitTorrent swarm.

    A MODEL is a magnet link or the path of a model.toml.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; prints at most one sentence about what went wrong."""
    try:
        status = torrentlm.main(arguments, prog_name="torrentlm", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as stop:  # click's own way out on a closed pipe
        _leave_pipe_alone()
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        return _ended_by(error)
    return status if isinstance(status, int) else 0


def _ended_by(error: BaseException) -> int:
    causes = list(_leaves(error))
    if any(isinstance(cause, KeyboardInterrupt | click.Abort) for cause in causes):
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if any(isinstance(cause, BrokenPipeError) for cause in causes):
        _leave_pipe_alone()
        return 1
    if os.environ.get("TORRENTLM_DEBUG"):
        raise error
    for cause in causes:
        if isinstance(cause, TorrentLMError):
            return _say(str(cause))
    cause = causes[0]
    what = f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": .")
    return _say(f"This should not have happened ({what}); set TORRENTLM_DEBUG=1 to see where.")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _say(sentence: str) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"torrentlm: {' '.join(sentence.split())}", err=True)
    return 1


def _leave_pipe_alone() -> None:
    """Nobody reads us any more: keep the interpreter's last flush from complaining about it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
