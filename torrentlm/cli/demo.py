"""``torrentlm demo``: a swarm of three holders on this machine, and a chat through it.

::

    recipe ─▶ publisher ─▶ magnet ─▶ holder-1, holder-2, holder-3 (a third of the blocks each, empty at the first run)
                                        │ by BitTorrent from the publisher, which then leaves
                                        ▼
                                     this process chats
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import torrentlm
from torrentlm.cli import text
from torrentlm.cli.engine import prepare, waiting
from torrentlm.cli.fleet import Fleet
from torrentlm.config import NODE_KEYS, default_data, load, variable_of
from torrentlm.errors import ArtifactError, ConfigError, NetworkError, StorageError
from torrentlm.records import Endpoint, Span

if TYPE_CHECKING:
    from rich.progress import Progress

RECIPE = "smollm2-135m-instruct.toml"
HOLDERS = 3
QUESTION = "Why is the sky blue?"
SILENCE_S = 300.0
"""No sign of life from any process for this long means that something is stuck."""


@click.command(short_help="Start a swarm of three on this machine and chat with it.")
@click.argument("prompt", required=False)
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the demo's data here.")
def command(prompt: str | None, data: Path | None) -> None:
    """Publish a small model, hold it on three peers, and chat through them.

    With PROMPT, or without a terminal, answer one prompt and exit. Everything stays on this machine, and everything
    that was started is gone at the end.
    """
    if prompt is not None:
        text.checked(prompt, "PROMPT")
    interactive = prompt is None and sys.stdin.isatty()
    folder = (data or default_data() / "demo").absolute()
    with _alone_in(folder), Fleet(folder / "logs", private_environment(os.environ)) as fleet:
        swarm = Demo(fleet, folder)
        with _progress() as progress:
            magnet = swarm.start(progress)
        click.echo(f"Magnet: {magnet}")
        click.echo(swarm.who_holds_what())
        _converse(magnet, folder / "client", None if interactive else prompt or QUESTION)


def private_environment(environment: Any) -> dict[str, str]:
    """The environment for the demo's processes: no settings but how to compute, and nothing beyond this machine."""
    settings = {variable_of(name) for name in NODE_KEYS} - {variable_of("threads"), variable_of("precision")}
    return {name: value for name, value in environment.items() if name not in settings} | {
        "TORRENTLM_LOOPBACK_ONLY": "1"
    }


def find_recipe() -> Path:
    """The demo model's recipe: beside the package in a checkout, else where an installation puts it."""
    places = (Path(torrentlm.__file__).parents[1], Path(sysconfig.get_path("data")) / "share" / "torrentlm")
    for place in places:
        if (path := place / "torrents" / RECIPE).is_file():
            return path
    raise ConfigError(f"The demo's recipe, torrents/{RECIPE}, is missing; install torrentlm again.")


@dataclass
class Demo:
    """The swarm's coming up: starts the processes in order and follows their events until the swarm stands alone."""

    fleet: Fleet
    folder: Path
    bars: dict[str, Any] = field(default_factory=dict)
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)
    total: int = 0

    def start(self, progress: Progress) -> str:
        """Return the magnet, with the holders as its peers, once they hold every block and the publisher has left."""
        from torrentlm.manifest.magnet import Magnet

        self._seed("publisher", str(find_recipe()), "--blocks", "none")
        self._wait_for(["publisher"], progress)
        publisher = endpoint_of(self.ready["publisher"])
        magnet = Magnet.parse(str(self.ready["publisher"].get("magnet", "")))
        names = [f"holder-{number}" for number in range(1, HOLDERS + 1)]
        for name, span in zip(names, thirds(self.total), strict=True):
            self._seed(
                name,
                str(replace(magnet, peers=(publisher,))),
                *("--blocks", str(span)),
                *("--dht-bootstrap", str(publisher)),
            )
        self._wait_for(names, progress)
        self.fleet.stop("publisher")
        held = {block for name in names for block in self.ready[name]["blocks"]}
        if missing := set(range(self.total)) - held:
            raise ArtifactError(f"Nobody holds {text.blocks(missing)}; see {self.folder / 'logs'}.")
        return str(replace(magnet, peers=tuple(endpoint_of(self.ready[name]) for name in names)))

    def _seed(self, name: str, model: str, *arguments: str) -> None:
        common = ("--data", str(self.folder / name), "--host", "127.0.0.1", "--port", "0")
        bootstrap = () if "--dht-bootstrap" in arguments else ("--dht-bootstrap", "none")
        self.fleet.start(name, model, *common, *bootstrap, *arguments)

    def _wait_for(self, names: list[str], progress: Progress) -> None:
        for name in names:
            self.bars[name] = progress.add_task(f"{name}: starting", total=None)
        heard = time.monotonic()
        while not all(name in self.ready for name in names):
            if (found := self.fleet.next_event(1.0)) is not None:
                if found[1].get("event") != "waiting":  # that it still waits is no sign of life
                    heard = time.monotonic()
                self._hear(*found, progress)
            if time.monotonic() - heard > SILENCE_S:
                raise NetworkError(f"Nothing happened for {SILENCE_S:.0f} s; see {self.folder / 'logs'}.")

    def _hear(self, name: str, event: dict[str, Any], progress: Progress) -> None:
        self.total = int(event.get("blocks_total", self.total))
        if event.get("event") == "progress" and name not in self.ready:
            done, total = event.get("done", 0), event.get("total", 0)
            progress.update(self.bars[name], description=f"{name}: {event.get('what')}", completed=done, total=total)
        elif event.get("event") == "ready":
            self.ready[name] = event
            has = "published" if name == "publisher" else text.blocks(event.get("blocks", []))
            progress.update(self.bars[name], description=f"{name}: {has}", completed=1, total=1)

    def who_holds_what(self) -> str:
        """One line a holder."""
        holders = [(name, event) for name, event in self.ready.items() if name != "publisher"]
        return text.table(
            [[name, str(endpoint_of(event)), text.blocks(event["blocks"])] for name, event in sorted(holders)]
        )


def thirds(blocks: int) -> list[Span]:
    """Split blocks 0 … ``blocks``-1 among the holders: an equal share of the layers each, the stem to the first and the
    head to the last. Raises ArtifactError for a model with fewer layer blocks than holders."""
    layers = blocks - 2
    if layers < HOLDERS:
        raise ArtifactError(f"A model of {text.count(blocks, 'block')} cannot be split among {HOLDERS} holders.")
    starts = [1 + layers * part // HOLDERS for part in range(HOLDERS)]
    starts[0] = 0
    return [Span(first, after - 1) for first, after in zip(starts, [*starts[1:], blocks], strict=True)]


def endpoint_of(ready: dict[str, Any]) -> Endpoint:
    return Endpoint("127.0.0.1", int(ready["port"]))


def _converse(magnet: str, data: Path, prompt: str | None) -> None:
    """Chat through the swarm from this process, or answer one prompt."""
    os.environ.update(TORRENTLM_LOOPBACK_ONLY="1")
    overrides = {"data": data, "port": 0, "host": "127.0.0.1", "dht_bootstrap": ["none"]}
    settings = load(magnet, overrides=overrides, environment=private_environment(os.environ))
    prepare(settings)
    from torrentlm.api import connect
    from torrentlm.cli.chat import Conversation, figures

    with waiting("Looking for holders …"):
        connection = connect(magnet, settings=settings)
    with connection as model:
        conversation = Conversation(model, {"max_new_tokens": 256}, interactive=prompt is None)
        if prompt is None:
            conversation.run()
        else:
            click.echo(f"\n{prompt}\n")
            conversation.answer(prompt)
        if model.last:
            click.echo(figures(model.last))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep a second demo out of the same folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError(f"Cannot write to {folder} ({(error.strerror or str(error)).lower()}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"Another demo runs in {folder}; end it, or give this one --data FOLDER.") from error
        yield


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on a terminal's stderr; elsewhere silent, so that scripts get the answer alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
