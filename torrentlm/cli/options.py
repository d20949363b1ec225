"""Arguments and options that several subcommands share, and how they become ``Settings``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isnan
from typing import Any, TypeVar

import click

from torrentlm.config import NODE_KEYS, PRECISIONS, Settings, load, load_node, variable_of
from torrentlm.errors import ConfigError
from torrentlm.records import RANGES

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

_ALLOW_CODE: Decorator = click.option(
    "--allow-code",
    multiple=True,
    metavar="SHA256",
    help="Run the code of its own that a model has, if it has this hash. Repeatable.",
)
_NETWORK: tuple[Decorator, ...] = (
    click.option("--data", metavar="FOLDER", help="Folder for blocks, torrents and the node's key."),
    click.option("--host", metavar="ADDRESS", help="Address to listen on."),
    click.option("--port", type=int, metavar="N", help="TCP and UDP port; 0 takes any free one."),
    click.option(
        "--peer", "peers", multiple=True, metavar="HOST:PORT", help="A node to contact at the start. Repeatable."
    ),
    click.option(
        "--dht-bootstrap",
        multiple=True,
        metavar="HOST:PORT",
        help='Where to enter the DHT; "none" for known peers alone. Repeatable.',
    ),
)
_BLOCKS: Decorator = click.option("--blocks", metavar="auto|none|A-B", help="Blocks to run. [default: auto]")
_MACHINE: tuple[Decorator, ...] = (
    click.option("--devices", metavar="auto|NAME,…", help="What to compute on, such as cpu or cuda:0,cuda:1."),
    click.option("--ram", metavar="SIZE", help="Memory budget, such as 4GB."),
    click.option("--vram", metavar="SIZE", help="Memory budget of each accelerator."),
    click.option("--offload", metavar="SIZE", help="RAM for blocks that accelerators have no room for. [default: off]"),
    click.option("--disk", metavar="SIZE", help="Disk budget."),
    click.option("--precision", metavar="|".join(PRECISIONS), help="What to keep and compute weights in."),
    click.option("--precision-of", metavar="A-B=NAME,…", help="Another precision for some blocks."),
    click.option("--threads", type=int, metavar="N", help="Compute threads. [default: one per core]"),
)
_SERVING: tuple[Decorator, ...] = (
    click.option("--upload", metavar="SIZE", help="Bytes of pieces to send per second. [default: off]"),
    click.option("--download", metavar="SIZE", help="Bytes of pieces to receive per second. [default: off]"),
    click.option(
        "--mirror/--no-mirror", default=None, help="Fetch and seed every file, of blocks that are not run, too."
    ),
    click.option("--lease", type=float, metavar="SECONDS", help="How long a silent client's memory is kept."),
    _ALLOW_CODE,
    click.option(
        "--recheck/--no-recheck",
        default=None,
        help="Compare a block with a recorded sample before serving any. [default: recheck]",
    ),
    click.option(
        "--adapters", metavar="SIZE", help="Apply adapters of sessions, and keep so much of them. [default: off]"
    ),
    click.option(
        "--prefetch", metavar="auto|off|SIZE", help="Disk for blocks fetched before anybody asks. [default: auto]"
    ),
    click.option("--prefetch-rate", metavar="auto|SIZE", help="Bytes per second for these. [default: auto]"),
)


_PUBLISHING: tuple[Decorator, ...] = (
    click.option("--allow-nan", is_flag=True, help="Publish weights that are NaN or infinite."),
    click.option("--no-tokenizer", is_flag=True, help="Publish a model that has no tokenizer."),
    click.option("--consume", is_flag=True, help="Remove the folder's weight files once they are published."),
)


def _apply(command: F, options: Iterable[Decorator]) -> F:
    """Decorate so that help shows the options in the order given."""
    for option in reversed(list(options)):
        command = option(command)
    return command


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""The options of ``sampling_options``, under the names that the engine has for them."""


def model_argument(command: F) -> F:
    """The model: a magnet link or the path of a model.toml."""
    return click.argument("model")(command)


def client_options(command: F) -> F:
    """Options of a subcommand that uses a swarm and holds no blocks."""
    return _apply(command, _NETWORK)


def node_options(command: F) -> F:
    """Every key of [node] as an option."""
    return _apply(command, (*_NETWORK, _BLOCKS, *_MACHINE, *_SERVING))


def machine_options(command: F) -> F:
    """What of a node is about the machine it runs on."""
    return _apply(command, (*_NETWORK[:3], *_MACHINE))


def publisher_options(command: F) -> F:
    """What of a node a publisher needs: the data folder, and which models' own code may run."""
    return _apply(command, (_NETWORK[0], _ALLOW_CODE))


def publish_options(command: F) -> F:
    """What a publisher lets pass; the same as keys of [model]."""
    return _apply(command, _PUBLISHING)


def adapter_option(command: F) -> F:
    """An adapter for what is generated."""
    option = click.option("--adapter", metavar="MAGNET", help="Apply this adapter of the model.")
    return _apply(command, (option,))


def sampling_options(command: F) -> F:
    """How tokens are picked, and how many; the names are those of ``Model.generate``'s arguments."""
    options: tuple[Decorator, ...] = (
        click.option("--max-new-tokens", type=_range("max_new_tokens"), default=256, show_default=True, metavar="N"),
        click.option("--temperature", type=_range("temperature"), default=0.0, show_default=True, metavar="T"),
        click.option("--top-k", type=_range("top_k"), default=0, metavar="K", help="0: all tokens."),
        click.option("--top-p", type=_range("top_p"), default=1.0, metavar="P"),
        click.option("--min-p", type=_range("min_p"), default=0.0, metavar="P"),
        click.option("--repetition-penalty", type=_range("repetition_penalty"), default=1.0, metavar="R"),
        click.option("--seed", type=_range("seed"), default=0, show_default=True, metavar="N"),
    )
    return _apply(command, options)


def _range(name: str) -> click.IntRange | click.FloatRange:
    lowest, highest = RANGES[name]
    if isinstance(lowest, int) and isinstance(highest, int):
        return click.IntRange(lowest, highest)
    return _Real(lowest, highest)


class _Real(click.FloatRange):
    """A number in a range; what is no number (nan) is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def machine_settings(model: str | None, options: Mapping[str, object]) -> Settings:
    """The node of ``model``, or without one that of the environment and the options alone."""
    return Settings(node=load_node(_given(options))) if model is None else settings_of(model, options)


def settings_of(model: str, options: Mapping[str, object], *, client: bool = False) -> Settings:
    """Settings for ``model`` with these options. A client takes any free port unless told otherwise: the port in a
    model.toml is the seeding node's, which may be running beside it."""
    overrides = _given(options)
    if client and not os.environ.get(variable_of("port")):
        overrides.setdefault("port", 0)
    return _letting_pass(load(model, overrides=overrides), options)


def _given(options: Mapping[str, object]) -> dict[str, object]:
    return {name: options[name] for name in NODE_KEYS if options.get(name) not in (None, ())}


def _letting_pass(settings: Settings, options: Mapping[str, object]) -> Settings:
    given = {name: options.get(name) for name in ("allow_nan", "consume", "no_tokenizer") if options.get(name)}
    if not given:
        return settings
    if settings.recipe is None:
        option = "--" + min(given).replace("_", "-")
        raise ConfigError(f"{option} is for publishing; a magnet names what is published already.")
    recipe = settings.recipe
    if "consume" in given and recipe.folder is None:
        raise ConfigError("--consume is for a folder; other sources are left alone.")
    return replace(
        settings,
        recipe=replace(
            recipe,
            allow_nan=recipe.allow_nan or "allow_nan" in given,
            consume=recipe.consume or "consume" in given,
            tokenizer=recipe.tokenizer and "no_tokenizer" not in given,
        ),
    )
