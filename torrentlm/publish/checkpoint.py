"""A Hugging Face folder as a source: safetensors, in one file or in shards. Pickle is never read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePath

from torrentlm.compute.custom_code import collect, read_settings
from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import Placed, TensorSpec, read_layout
from torrentlm.publish.payload import is_payload, tidy, to_json
from torrentlm.publish.source import read_exactly, unreadable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON = 64 * 1024 * 1024  # bytes


class Checkpoint:
    """The checkpoint in ``folder``. Only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places = dict(self._find())

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return {name: placed.tensor for name, (_, placed) in self._places.items()}

    @property
    def weight_files(self) -> Mapping[Path, frozenset[str]]:
        """The files that hold the tensors, each with the names of all tensors in it, listed in an index or not."""
        paths = {path for path, _ in self._places.values()}
        return {path: frozenset(_tensors(path)) for path in sorted(paths)}

    def read(self, name: str) -> Iterator[memoryview]:
        path, placed = self._places[name]
        return read_exactly(path, placed.start, placed.tensor.nbytes)

    def files(self) -> Mapping[str, bytes]:
        found = {}
        for path in sorted((*self._folder.iterdir(), *self._folder.glob("*/config.json"))):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and is_payload(name):
                found[name] = tidy(name, _read_small(path))
        if "config.json" not in found:
            raise ArtifactError(f"{self._folder} has no config.json; point to the folder of a Hugging Face model")
        code = collect(self._folder, read_settings(self._folder))
        if code is not None:
            named = json.loads(found["config.json"]) | {"auto_map": dict(code.classes)}
            found |= {"config.json": to_json(named), **code.files}
        return {name: content for name, content in found.items() if content or name.endswith(".py")}

    def _find(self) -> Iterator[tuple[str, tuple[Path, Placed]]]:
        if (self._folder / SINGLE).is_file():
            for name, placed in _tensors(self._folder / SINGLE).items():
                yield name, (self._folder / SINGLE, placed)
        elif (self._folder / INDEX).is_file():
            yield from self._find_shards()
        elif pickled := sorted(path.name for path in self._folder.iterdir() if path.suffix in PICKLED):
            raise ArtifactError(
                f"{self._folder / pickled[0]} is a pickle, which can run code when it is read; convert the checkpoint"
                f" without running any: torrentlm convert {shlex.quote(str(self._folder))}"
            )
        else:
            raise ArtifactError(f"{self._folder} has neither {SINGLE} nor {INDEX}; fetch the whole checkpoint")

    def _find_shards(self) -> Iterator[tuple[str, tuple[Path, Placed]]]:
        index = self._folder / INDEX
        shards: dict[str, Mapping[str, Placed]] = {}
        for name, shard in read_index(index, (".safetensors",)).items():
            path = self._folder / shard
            if shard not in shards:
                if not path.is_file():
                    raise ArtifactError(f"{path} is missing, although {INDEX} lists it; fetch the whole checkpoint")
                shards[shard] = _tensors(path)
            if name not in shards[shard]:
                raise ArtifactError(f"{path} lacks tensor {name}, which {INDEX} places there; fetch both files again")
            yield name, (path, shards[shard][name])


def _tensors(path: Path) -> dict[str, Placed]:
    try:
        with path.open("rb") as file:
            layout = read_layout(file, path.stat().st_size, str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    return {placed.tensor.name: placed for placed in layout.tensors}


def read_index(index: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Tensor name to shard; shards are files of the same folder, whose names end so."""

    def is_shard(name: object) -> bool:
        return isinstance(name, str) and PurePath(name).name == name and name.endswith(endings)

    try:
        document = json.loads(_read_small(index))
    except (ValueError, RecursionError):
        document = None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(is_shard, weight_map.values())):
        raise ArtifactError(f"{index} is not a usable index of shards; fetch it again")
    return weight_map


def _read_small(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(content) > MAX_JSON:
        raise ArtifactError(f"{path} is far too large for what it should be; fetch the model again")
    return content
