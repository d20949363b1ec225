"""Weights straight from block files: each tensor is a view of the file's own pages, shared by all processes
that map it.

A tensor is copied only where its dtype, its device or its alignment must change, and then tensor by tensor.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from torrentlm.compute.border import DTYPES, aligned, view_of
from torrentlm.compute.skeleton import replace_parameters
from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import Layout, read_layout

Names = Sequence[tuple[str, str]]
"""(prefix in the file, prefix in the model): to the model a tensor's name begins with the second instead."""

BlockFiles = Iterable[tuple[Path, Names]]
"""Block files and how the model calls their tensors."""

MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it yet


def load_weights(files: BlockFiles) -> dict[str, torch.Tensor]:
    """Every tensor in these files under the model's name for it, a read-only view of the file.

    A file that is named twice is mapped once. Raises ArtifactError for a broken file or a tensor without a name
    in the model, StorageError when a file cannot be read.
    """
    weights: dict[str, torch.Tensor] = {}
    mapped: dict[Path, list[tuple[str, torch.Tensor]]] = {}
    for path, names in files:
        if path not in mapped:
            mapped[path] = list(_map_file(path))
        used = 0
        for file_prefix, model_prefix in names:
            for name, tensor in mapped[path]:
                if name.startswith(file_prefix):
                    weights[model_prefix + name.removeprefix(file_prefix)] = tensor
                    used += 1
        if used < len(mapped[path]):
            raise ArtifactError(
                f"{path.name} holds tensors that the manifest gives no name; fetch the model torrent again."
            )
    return weights


def attach_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], needed: Iterable[str], device: torch.device
) -> None:
    """Put ``weights`` (canonical names) in the place of the model's ghosts, in the dtype that the model has there.

    ``needed`` names must be there with the model's own shape: ArtifactError otherwise. Tensors are taken out of
    ``weights`` one by one, so that what a cast replaces can be freed at once.
    """
    wanted = set(needed)
    taken: set[str] = set()

    def attach(name: str, current: torch.Tensor) -> torch.Tensor | None:
        if name not in wanted:
            return None
        tensor = weights.pop(name, None)
        if tensor is None:
            raise ArtifactError(f"The block files lack the tensor {name}; fetch the model torrent again.")
        if tensor.shape != current.shape:
            raise ArtifactError(
                f"The tensor {name} has shape {list(tensor.shape)} where the model has {list(current.shape)}."
            )
        taken.add(name)
        return tensor.to(device=device, dtype=current.dtype)

    def parameter(name: str, ghost: nn.Parameter) -> nn.Parameter:
        tensor = attach(name, ghost)
        return ghost if tensor is None else nn.Parameter(tensor, requires_grad=ghost.requires_grad)

    replace_parameters(model, parameter)
    for prefix, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            if name in weights and (tensor := attach(name, buffer)) is not None:
                module._buffers[key] = tensor
    if missing := sorted(wanted - taken):
        raise ArtifactError(f"The block files lack the tensor {missing[0]}; fetch the model torrent again.")


def _map_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            layout = read_layout(file, size, path.name)
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StorageError(
            f"The block file {path} cannot be read ({error.strerror}); check the data folder."
        ) from error
    _advise(pages)
    return _tensors(path, pages, layout)


def _tensors(path: Path, pages: mmap.mmap, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    for placed in layout.tensors:
        spec = placed.tensor
        dtype = DTYPES.get(spec.dtype)
        if dtype is None:
            raise ArtifactError(f"{path.name} holds {spec.dtype} tensors, which this version cannot compute with.")
        count = (placed.end - placed.start) // dtype.itemsize
        if count == 0:
            yield spec.name, torch.empty(spec.shape, dtype=dtype)
            continue
        yield spec.name, aligned(view_of(pages, dtype, count, placed.start)).view(spec.shape)


def _advise(pages: mmap.mmap) -> None:
    """Ask for large pages and for all of the file now rather than in the first step; either may be unsupported."""
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), MADV_POPULATE_READ):
        if advice is not None:
            with suppress(OSError, ValueError):
                pages.madvise(advice)
