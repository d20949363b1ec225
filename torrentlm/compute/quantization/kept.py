"""Quantized blocks on disk, so that a second start maps them: a safetensors file each, named by what it was made of.

The name is a hash over the block file's name (its content's hash), the recipe and what it depends on. Its
checksum, and what its tensors are, stand in a small JSON file beside it, written last: without that, or with another
checksum, it is not used. Files of other recipes are removed. Where the folder cannot be written to, nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from torrentlm.compute.border import DTYPE_NAMES, pack
from torrentlm.compute.quantization.packed import TILE, Packed
from torrentlm.compute.quantization.recipe import VERSION
from torrentlm.compute.quantization.rounding import GROUP
from torrentlm.compute.quantization.tensor import QuantizedTensor
from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import TensorSpec, layout, write

Tensors = Mapping[str, torch.Tensor]
_RECIPE = f"{VERSION}-{GROUP}-{TILE}"


def key_of(block: str, names: Mapping[str, bool], kind: str, dtype: torch.dtype) -> str:
    """What a quantized block is kept under: its file's name, the names of its tensors in the model, kind and dtype."""
    said = json.dumps([block, sorted(names.items()), kind, DTYPE_NAMES[dtype]])
    return f"{hashlib.sha256(said.encode()).hexdigest()[:40]}.{_RECIPE}"


def keep(folder: Path, name: str, tensors: Tensors) -> None:
    """Write a block's tensors. A disk that is full or read-only keeps nothing; a crash leaves no file that is used."""
    target, parts, about = folder / f"{name}.safetensors", dict(_parts(tensors)), _about(tensors)
    temporary = folder / f"{name}.{os.getpid()}.part"
    planned = layout(TensorSpec(key, DTYPE_NAMES[part.dtype], tuple(part.shape)) for key, part in parts.items())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_others(folder)
        try:
            digest = hashlib.sha256()
            with temporary.open("wb") as file:

                def sink(data: bytes | memoryview) -> None:
                    digest.update(data)
                    file.write(data)

                write(planned, lambda key: [memoryview(pack(parts[key]).data)], sink)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            temporary.write_text(json.dumps({"checksum": digest.hexdigest(), "tensors": about}), encoding="utf-8")
            temporary.replace(target.with_suffix(".json"))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return


def find(
    folder: Path, name: str, dtype: torch.dtype, read: Callable[[Path], Iterator[tuple[str, torch.Tensor]]]
) -> dict[str, torch.Tensor] | None:
    """A kept block's tensors, mapped by ``read``; None if there is none, or if it is not what was written."""
    path = folder / f"{name}.safetensors"
    try:
        document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if _checksum(path) != document["checksum"]:
            return None
        parts = dict(read(path))
        return {key: _whole(key, said, parts, dtype) for key, said in document["tensors"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArtifactError):
        return None


def _parts(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in tensors.items():
        if (packed := _packed(tensor)) is not None:
            yield from ((f"{key}:{part}", value.cpu()) for part, value in packed.parts.items())
        else:
            yield key, tensor.cpu()


def _about(tensors: Tensors) -> dict[str, list[object] | None]:
    """What the parts do not say: kind, tile and whether it is turned; None for a plain tensor."""
    return {
        key: [packed.kind, packed.tile, tensor.turned]
        if isinstance(tensor, QuantizedTensor) and (packed := _packed(tensor)) is not None
        else None
        for key, tensor in tensors.items()
    }


def _packed(tensor: torch.Tensor) -> Packed | None:
    packed = tensor.packed if isinstance(tensor, QuantizedTensor) else None
    return packed if isinstance(packed, Packed) else None


def _whole(key: str, said: list[object] | None, parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
    if said is None:
        return parts[key]
    kind, tile, turned = said
    packed = Packed(str(kind), parts[f"{key}:codes"], parts[f"{key}:scales"], int(str(tile)))
    return QuantizedTensor(packed, dtype, bool(turned))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_others(folder: Path) -> None:
    """Files of other recipes, and parts that a crash left."""
    for path in folder.iterdir():
        ours = f".{_RECIPE}." in path.name and path.suffix in (".safetensors", ".json")
        if not ours and not path.name.endswith(f".{os.getpid()}.part"):
            with suppress(OSError):
                path.unlink()
