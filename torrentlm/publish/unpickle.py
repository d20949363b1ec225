"""Turn a checkpoint of pickles into safetensors, for an operator who asks for it by name; publishing never does.

torch's restricted reader (``weights_only=True``) builds tensors and plain containers and nothing else: a pickle that
wants to call anything is refused, not run. Files are mapped, so that one tensor at a time is in memory.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.publish.checkpoint import INDEX, PICKLED, SINGLE, read_index
from torrentlm.publish.source import unreadable

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Keys under which training programs put the weights, beside other things."""


def convert_folder(folder: Path) -> tuple[Path, ...]:
    """Write safetensors beside the pickles of ``folder``, one for each; the files written, with shards an index last.

    Raises ArtifactError (nothing to convert, damaged, holds more than
    tensors) and StorageError (cannot be written); what was there stays as it was.
    """
    try:
        sources = _find(folder)
        if len(sources) == 1:
            _convert(sources[0], folder / SINGLE)
            return (folder / SINGLE,)
        return _convert_shards(folder, sources)
    except OSError as error:
        raise StorageError(
            f"cannot write safetensors into {folder} ({(error.strerror or str(error)).lower()}); make room there,"
            " or convert a copy elsewhere"
        ) from error


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}; give the folder of a checkpoint")
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise ArtifactError(f"{folder} has safetensors already; publish that, or move it away first")
    if (folder / _PICKLED_INDEX).is_file():
        names = sorted(set(read_index(folder / _PICKLED_INDEX, PICKLED).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ArtifactError(f"{folder / missing[0]} is missing, although {_PICKLED_INDEX} lists it; fetch it too")
        return [folder / name for name in names]
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLED and not _NO_WEIGHTS.match(path.name))
    if len(found) != 1:
        problem = f"several pickles ({', '.join(path.name for path in found[:5])})" if found else "no pickled weights"
        raise ArtifactError(f"{folder} has {problem}; give a folder with one, or with {_PICKLED_INDEX}")
    return found


def _convert_shards(folder: Path, sources: Sequence[Path]) -> tuple[Path, ...]:
    targets = [folder / f"model-{number:05}-of-{len(sources):05}.safetensors" for number in range(1, len(sources) + 1)]
    weight_map: dict[str, str] = {}
    for source, target in zip(sources, targets, strict=True):
        weight_map |= dict.fromkeys(_convert(source, target), target.name)
    index = folder / INDEX
    part = index.with_name(f"{INDEX}.part")
    part.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
    part.replace(index)
    return (*targets, index)


def _convert(source: Path, target: Path) -> list[str]:
    """Write the tensors of one pickle, all or nothing; their names."""
    tensors = _weights(_read(source), source)
    planned = layout(_spec(name, tensor, source) for name, tensor in tensors.items())
    part = target.with_name(f"{target.name}.part")

    def read(name: str) -> Iterator[memoryview]:
        yield tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    try:
        with part.open("wb") as file:
            write(planned, read, file.write)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return list(tensors)


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # older files cannot be mapped
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        with warnings.catch_warnings():  # the sentence below says it all
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a foreign parser on a foreign file
        raise ArtifactError(
            f"{path} is damaged or holds more than tensors, which were not run; fetch the model as safetensors"
        ) from error


def _weights(found: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors by name, out of what training programs wrap around them."""
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    tensors = (
        {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise ArtifactError(f"{path} has no named tensors; give the file with the model's weights")
    return tensors


def _spec(name: str, tensor: torch.Tensor, path: Path) -> TensorSpec:
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_quantized:
        raise ArtifactError(
            f"{path} holds {name} as {tensor.dtype}, {tensor.layout}; convert it to plain numbers first"
        )
    return TensorSpec(name, DTYPES[tensor.dtype], tuple(tensor.shape))
