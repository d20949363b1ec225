"""What an operator can set, as plain data with its defaults; docs/model-toml.md explains each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torrentlm.records import Endpoint, Span

PRECISIONS = ("auto", "F32", "BF16", "F16", "INT8", "INT4")
FLOORS = ("F32", "BF16", "F16", "INT8", "INT4")
DTYPES = ("F32", "BF16", "F16")
TASKS = ("auto", "encoder")

Blocks = Literal["auto", "none"] | Span
"""Blocks to run: as many as fit, none (only seed the files), or exactly these."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to publish a model: tables [model] and [model.source].

    The weights come from exactly one of ``folder`` (a Hugging Face checkpoint), ``gguf`` (a file), ``package`` with
    ``file`` (a file in an installed Python package: a GGUF, or a checkpoint's config.json), or ``config`` (a
    config.json alone: random weights, those of ``seed``). ``dtype`` None: the checkpoint's own precision (GGUF: fp32).

    ``layer_stacks``, ``task``, ``replay`` and ``chunks`` say how to split what cannot be split by looking at it, see
    docs/model-toml.md.
    ``tokenizer``: refuse a model that has none; ``allow_nan``: do not refuse weights that are NaN or infinite.
    ``consume``: remove the folder's weight files once they are published.
    ``floor``: the lowest precision that holders may use, None for any.
    """

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    package: str | None = None
    file: str | None = None
    config: Path | None = None
    seed: int = 0
    layers_per_block: int = 1
    dtype: str | None = None
    tokenizer: bool = True
    allow_nan: bool = False
    consume: bool = False
    floor: str | None = None
    layer_stacks: tuple[str, ...] = ()
    task: str = "auto"
    replay: bool = False
    chunks: bool = True


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """An adapter to publish, a table [[adapter]]: a PEFT ``folder`` made for the model that the file names."""

    name: str
    folder: Path


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """``torrentlm`` in the XDG data folder."""
    folder = Path(environment.get("XDG_DATA_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".local" / "share") / "torrentlm"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How this node runs: table [node]. Sizes in bytes; a budget of None is what the machine has free at the start.

    ``dht_bootstrap`` None: the public nodes; (): none, so that the DHT starts from known peers alone. ``port`` 0: any
    free one. ``devices`` None: all accelerators, else the CPU; ``ram`` is the CPU's budget, ``vram`` that of each
    accelerator; ``offload``: bytes of RAM for blocks that accelerators have no room for. ``threads`` None: one per
    core. ``lease``: seconds after which an idle session's memory is freed.
    ``allow_code``: hashes of the code of its own that a model may run here.
    ``adapters``: bytes of adapters that sessions may bring along, 0 to apply none.
    ``recheck``: compare a block with a recorded sample before any is served.
    ``prefetch``: bytes of ``disk`` that blocks fetched before anybody asks for them may take, 0 for none, None for a
    quarter of what is left; ``prefetch_rate``: bytes per second for them, None for a quarter of the fastest rate seen.
    ``upload``, ``download``: bytes of pieces per second, 0 for no limit. ``mirror``: fetch and seed every file.
    ``precision_of``: blocks that are kept in another precision than ``precision``.
    """

    data: Path = field(default_factory=default_data)
    host: str = "0.0.0.0"  # noqa: S104  # a peer is there for others
    port: int = 6881
    peers: tuple[Endpoint, ...] = ()
    dht_bootstrap: tuple[Endpoint, ...] | None = None
    blocks: Blocks = "auto"
    devices: tuple[str, ...] | None = None
    ram: int | None = None
    vram: int | None = None
    offload: int = 0
    disk: int | None = None
    precision: str = "auto"
    precision_of: tuple[tuple[Span, str], ...] = ()
    threads: int | None = None
    lease: float = 60.0
    allow_code: tuple[str, ...] = ()
    adapters: int = 0
    recheck: bool = True
    prefetch: int | None = None
    prefetch_rate: int | None = None
    upload: int = 0
    download: int = 0
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """A model to publish (``recipe``) or to join (``magnet``), the node to do it with, and adapters to publish."""

    recipe: Recipe | None = None
    magnet: str | None = None
    node: NodeConfig = field(default_factory=NodeConfig)
    adapters: tuple[AdapterRecipe, ...] = ()
