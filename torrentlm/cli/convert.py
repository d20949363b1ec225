"""``torrentlm convert``: a checkpoint of pickles becomes safetensors, which can be published."""

from __future__ import annotations

from pathlib import Path

import click

from torrentlm.cli.engine import waiting


@click.command(short_help="Convert a checkpoint's pickles (.bin, .pt) to safetensors.")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Write safetensors beside the pickles in FOLDER, and print the names of the files written.

    Only tensors are read: nothing that a pickle may want to run is run. The pickles stay where they are.
    """
    with waiting(f"Converting {folder} …"):
        from torrentlm.publish.unpickle import convert_folder

        written = convert_folder(folder)
    for path in written:
        click.echo(path)
