"""``torrentlm chat``: a conversation, line by line."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, cast

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
from torrentlm.errors import ConfigError, TorrentLMError

if TYPE_CHECKING:
    from torrentlm.api import Chat, Model
    from torrentlm.client.generation import GenerationResult, RouteHop

PROMPT = "> "
JUST_ANSWERED_S = 1.0
"""A Ctrl-C this soon after an answer was meant for the answer."""

HELP = """\
/system TEXT   set the system prompt (without TEXT: show it) and start anew
/reset         forget the conversation; the system prompt stays
/route         which peer runs which blocks
/stats         figures of the last answer, and of the network
/quit          leave (also Ctrl-D, or Ctrl-C at an empty prompt)
Ctrl-C stops an answer."""


@click.command(short_help="Chat with a model.")
@model_argument
@click.option("--system", metavar="TEXT", help="System prompt.")
@adapter_option
@sampling_options
@client_options
def command(model: str, system: str | None, adapter: str | None, **options: Any) -> None:
    """Chat with MODEL; /help lists what can be typed besides messages."""
    settings = settings_of(model, options, client=True)
    text.checked(system or "", "--system")
    how = {name: options[name] for name in SAMPLING}
    prepare(settings)
    from torrentlm.api import connect

    with waiting("Looking for holders …"):
        connection = connect(model, settings=settings, on_event=Patience())
    with connection as swarm:
        Conversation(swarm, how, system=system, adapter=adapter).run()


class Conversation:
    """Reads lines from standard input until it ends.

    ``interactive``: with a prompt, line editing and figures, and neither Ctrl-C nor an error in a line's work ends it.
    ``how`` are keyword arguments of ``Chat.send``.
    """

    def __init__(
        self,
        model: Model,
        how: dict[str, Any],
        *,
        system: str | None = None,
        adapter: str | None = None,
        interactive: bool | None = None,
    ) -> None:
        self._model = model
        self._how = how
        self._chat: Chat = model.chat(system=system, adapter=adapter)
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty() if interactive is None else interactive
        self._answered_at = float("-inf")
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/route": self._route,
            "/stats": self._stats,
            "/help": lambda rest: click.echo(HELP),
        }

    def run(self) -> None:
        """Until /quit, the end of input, or Ctrl-C at an empty prompt (raised as KeyboardInterrupt)."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() line editing and history
        if self._interactive:
            click.echo("Type a message; /help lists commands, /quit leaves.")
        with self._chat:
            while (line := self._read()) is not None:
                if line == "/quit":
                    return
                self.handle(line)

    def handle(self, line: str) -> None:
        """One line: a command, or a message to answer."""
        name, _, rest = line.partition(" ")
        if name in self._commands:
            with self._going_on():
                self._commands[name](rest.strip())
        elif name.startswith("/") and "/" not in name[1:]:
            click.echo(f"There is no {name}; /help lists the commands.")
        elif line:
            self.answer(line)

    def answer(self, message: str) -> None:
        """Print the answer as it comes; an answer that was stopped stays in the history as far as it came."""
        pieces = self._chat.send(message, **self._how)
        # Closing the generator tells the holders to stop.
        with self._going_on(" "), contextlib.closing(cast("Generator[str, None, None]", pieces)):
            for piece in pieces:
                click.echo(piece, nl=False)
            click.echo()
            if self._interactive and self._model.last:
                click.secho(figures(self._model.last), dim=True)

    @contextlib.contextmanager
    def _going_on(self, margin: str = "") -> Iterator[None]:
        """For the work on a line: where somebody types, Ctrl-C or an error ends that work and not the conversation."""
        try:
            yield
        except (KeyboardInterrupt, TorrentLMError) as error:
            if not self._interactive:
                raise
            click.echo(f"{margin}[{'stopped' if isinstance(error, KeyboardInterrupt) else error}]")
        finally:
            self._answered_at = time.monotonic()

    def _read(self) -> str | None:
        """The next line without the space around it; None at the end of input."""
        if not self._interactive:
            line = text.read(sys.stdin.readline, "Standard input")
            return line.strip() if line else None
        while True:
            try:
                return text.read(lambda: input(PROMPT), "This line").strip()
            except EOFError:
                click.echo()
                return None
            except ConfigError as error:
                click.echo(f"[{error}]")
            except KeyboardInterrupt:
                click.echo()
                if not self._typed() and time.monotonic() - self._answered_at > JUST_ANSWERED_S:
                    raise

    def _typed(self) -> bool:
        """Whether something stood on the line that Ctrl-C ended: then it clears the line, as in a shell."""
        readline = sys.modules.get("readline")
        return bool(readline and readline.get_line_buffer())

    def _system(self, prompt: str) -> None:
        if prompt:
            self._chat.system = prompt
            self._chat.reset()
        click.echo(f"System prompt: {self._chat.system or '(none)'}")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        click.echo("The conversation starts anew.")

    def _route(self, rest: str) -> None:
        click.echo(route_lines(self._model.route()))

    def _stats(self, rest: str) -> None:
        if self._model.last:
            click.echo(figures(self._model.last))
        for name, value in self._model.stats().items():
            label = name.replace("_", " ")
            if isinstance(value, list):
                click.echo(f"{label}:\n{rows(value)}" if value else f"{label}: none")
            else:
                click.echo(f"{label}: {value}")


def figures(result: GenerationResult) -> str:
    """One line about an answer: ``42 tokens · 9.21 tokens/s · first after 0.61 s``."""
    parts = [text.count(len(result.tokens), "token")]
    if result.tokens_per_second > 0:
        parts.append(f"{result.tokens_per_second:.3g} tokens/s")
    return " · ".join([*parts, f"first after {result.time_to_first_token_s:.2f} s"])


def rows(items: list[dict[str, Any]]) -> str:
    """One line an item, such as a pipe's ``127.0.0.1:39183  1.75 ms``; what is not known yet stays empty."""
    cells = [[_figure(name, value) for name, value in item.items()] for item in items]
    return textwrap.indent(text.table(cells), "  ")


def _figure(name: str, value: object) -> str:
    if value is None:
        return ""
    return f"{value} ms" if name.endswith("_ms") else str(value)


def route_lines(hops: tuple[RouteHop, ...]) -> str:
    """One line a hop: ``127.0.0.1:6881  blocks 0-10``."""
    return text.table([[hop.peer, text.blocks(range(hop.first, hop.last + 1))] for hop in hops])
