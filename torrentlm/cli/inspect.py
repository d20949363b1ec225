"""``torrentlm inspect``: what a model or a torrent is made of, and who holds it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torrentlm.cli import text
from torrentlm.cli.engine import Patience, prepare, waiting
from torrentlm.cli.options import client_options, settings_of
from torrentlm.errors import ArtifactError

if TYPE_CHECKING:
    from torrentlm.manifest.canonical import TensorSpec

LEFT_OUT = ("files", "a_v1", "b_v1")
"""Columns for scripts alone: a block's files are named by their hashes."""
SHOWN_DIGITS = 10
_HASH = re.compile("[0-9a-f]{40,}")


@click.command(short_help="Show blocks, sizes, hashes, tensors and holders.")
@click.argument("what", nargs=-1, required=True, metavar="MODEL|FILE.torrent")
@click.option("--diff", is_flag=True, help="Compare two models, block by block: --diff MODEL MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; see docs/cli.md.")
@client_options
def command(what: tuple[str, ...], diff: bool, as_json: bool, **options: object) -> None:
    """Show what MODEL is made of and which peers hold it, or, without any network, what FILE.torrent contains.

    The table counts the tensors of each block of MODEL, --json lists them. With --diff, show which blocks two models
    share: one file on disk, one copy in memory, one swarm.
    """
    if len(what) != 1 + diff:
        raise click.UsageError("--diff compares two models." if diff else "One model or torrent at a time, or --diff.")
    if diff:
        found = _compare(what, options)
    else:
        found = inspect_torrent(Path(what[0])) if what[0].endswith(".torrent") else _ask_swarm(what[0], options)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found)


def _ask_swarm(model: str, options: dict[str, object]) -> dict[str, Any]:
    settings = settings_of(model, options, client=True)
    prepare(settings)
    from torrentlm.api import connect

    with waiting("Asking the swarm …"), connect(model, settings=settings) as swarm:
        return swarm.inspect()


def _compare(models: tuple[str, ...], options: dict[str, object]) -> dict[str, Any]:
    first, second = (settings_of(model, options, client=True) for model in models)
    prepare(first)
    from torrentlm.api import compare

    with waiting("Looking for the models …"):
        return compare(*models, settings=(first, second), on_event=Patience())


def inspect_torrent(path: Path) -> dict[str, Any]:
    """A .torrent as plain values; a block's with ``tensors`` if it lies in a model's folder or beside its file.

    Raises ArtifactError if it cannot be read or is not one that torrentlm publishes.
    """
    from torrentlm.manifest.magnet import Magnet
    from torrentlm.manifest.torrent import MAX_TORRENT, Torrent

    try:
        if path.stat().st_size > MAX_TORRENT:
            raise ArtifactError(f"{path} is too large for a torrent.")
        torrent = Torrent.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise ArtifactError(f"Cannot read {path} ({(error.strerror or str(error)).lower()}).") from error
    found: dict[str, Any] = {
        "name": torrent.name,
        "magnet": str(Magnet(torrent.v1, torrent.v2, torrent.name)),
        "v1": torrent.v1.hex(),
        "v2": torrent.v2.hex(),
        "size": torrent.size,
        "piece_length": torrent.piece_length,
        "files": [{"path": "/".join(file.path), "size": file.size, "root": file.root.hex()} for file in torrent.files],
    }
    specs = _tensors_in_model(path, torrent.v2) or _tensors_beside(path, torrent.name, torrent.size)
    return found | {"tensors": [spec.described() for spec in specs]} if specs else found


def _tensors_in_model(path: Path, v2: bytes) -> list[TensorSpec]:
    """A block torrent's tensors under the model's names, if it lies in a model's folder, below the manifest.

    Equal layers are one file, whose tensors then have several names, each listed.
    """
    from torrentlm.manifest.manifest import FILE_NAME, MAX_BYTES, Manifest

    try:
        with (path.absolute().parent.parent / FILE_NAME).open("rb") as file:
            manifest = Manifest.from_bytes(file.read(MAX_BYTES + 1))
    except (OSError, ArtifactError):
        return []  # it lies elsewhere, or another version published it; the torrent can be shown all the same
    used = [used for block in manifest.blocks for used in block.files if manifest.files[used.file].v2 == v2]
    return list(dict.fromkeys(spec for part in used for spec in manifest.tensors_of(part)))


def _tensors_beside(path: Path, name: str, size: int) -> list[TensorSpec]:
    """The tensors, by their names in the file, of a block file that lies beside its torrent."""
    from torrentlm.manifest.canonical import read_canonical

    payload = path.parent / name
    if not name.endswith(".safetensors") or not payload.is_file() or payload.stat().st_size != size:
        return []
    with payload.open("rb") as file:
        return list(read_canonical(file, size, str(payload)).specs)


def _show(found: dict[str, Any]) -> None:
    """Plain values first, then a table for each list; lines stay whole, so that they can be copied and searched."""
    plain = {name: value for name, value in found.items() if name == "proof" or not isinstance(value, list | dict)}
    click.echo(text.table([[name.replace("_", " "), _cell(name, value)] for name, value in plain.items()]))
    for name, rows in found.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            columns = [column for column in dict.fromkeys(itertools.chain(*rows)) if column not in LEFT_OUT]
            cells = [[_short(_cell(column, row.get(column))) for column in columns] for row in rows]
            click.echo(f"\n{name}\n" + text.table([columns, *cells]))


def _short(cell: str) -> str:
    """Hashes cut to their first digits, so that a row stays a line; --json has them whole."""
    return _HASH.sub(lambda found: found[0][:SHOWN_DIGITS] + "…", cell)


def _cell(name: str, value: Any) -> str:
    if name == "proof":
        return text.proof(value)
    if name == "size" or name.endswith("_bytes"):
        return text.size(value)
    if name == "tensors":  # of a block
        return str(len(value)) if value else ""
    if name == "shape":
        return "x".join(map(str, value)) or "scalar"
    if isinstance(value, list | tuple):
        return ", ".join(_cell("", item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={_cell(key, item)}" for key, item in value.items())
    return "" if value is None else str(value)
