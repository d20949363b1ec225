"""Weights straight from block files: each tensor is a view of the file's pages, shared by all processes that map it.

A tensor is copied only where its dtype, its device or its alignment must change, and then one after the other.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import nn

from torrentlm.compute.border import DTYPES, aligned, view_of
from torrentlm.compute.device import memory_errors
from torrentlm.compute.skeleton import replace_parameters
from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import FLOATING, Layout, read_layout

Names = Sequence[tuple[str, str]]
"""(prefix in the file, prefix in the model): to the model a tensor's name begins with the second instead."""

BlockFiles = Iterable[tuple[Path, Names]]
"""Block files and what the model calls their tensors."""

Convert = Callable[[Mapping[str, torch.Tensor]], Iterable[tuple[str, torch.Tensor]]]
"""Makes the model's tensors of a block file's."""

MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it yet


class BlockWeights:
    """One block file's tensors by their names in the file, in one dtype on one device. Nothing may write to them."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.name = path.name
        self.tensors = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in _map_file(path, dtype, device)
        }
        self._converted: dict[frozenset[str], dict[str, torch.Tensor]] = {}

    def converted(self, named: Mapping[str, torch.Tensor], convert: Convert) -> dict[str, torch.Tensor]:
        """``convert(named)``, made once for all spans that call the tensors the same."""
        names = frozenset(named)
        with _loading:
            if names not in self._converted:
                self._converted[names] = dict(convert(named))
            return self._converted[names]


_in_use: WeakValueDictionary[tuple[object, ...], BlockWeights] = WeakValueDictionary()
"""Files are named by their content, so spans and models that share a file share its one copy in memory."""
_loading = threading.Lock()


class Weights:
    """The weights of a span under the model's names, floating point ones in ``dtype``, all on ``device``.

    Raises ArtifactError for a broken file or a tensor that gets no name, StorageError for an unreadable file.
    """

    def __init__(
        self,
        files: BlockFiles,
        dtype: torch.dtype,
        device: torch.device,
        convert: Convert = lambda named: named.items(),
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._files: list[BlockWeights] = []
        for path, names in files:
            file = load_block(path, dtype, device)
            self._files.append(file)
            unnamed = set(file.tensors)
            named: dict[str, torch.Tensor] = {}
            for here, there in names:
                for name in filter(lambda name: name.startswith(here), file.tensors):
                    named[there + name.removeprefix(here)] = file.tensors[name]
                    unnamed.discard(name)
            self.tensors |= file.converted(named, convert)
            if unnamed:
                raise ArtifactError(
                    f"{file.name} holds the tensor {min(unnamed)}, which the manifest does not mention."
                )


def attach_weights(
    model: nn.Module, weights: Mapping[str, torch.Tensor], needed: Collection[str], canonical: Mapping[str, str]
) -> None:
    """Put weights in the place of the model's ghosts: all that are ``needed`` (canonical names) and no others.

    Raises ArtifactError when one is missing or has another shape than the model's.
    """
    available = {canonical.get(name, name): tensor for name, tensor in weights.items()}
    if missing := sorted(name for name in needed if name not in available):
        raise ArtifactError(f"The block files lack the tensor {missing[0]}; fetch the model torrent again.")

    def fitting(name: str, current: torch.Tensor) -> torch.Tensor:
        tensor = available[name]
        if tensor.shape != current.shape:
            raise ArtifactError(f"The tensor {name} is {list(tensor.shape)} where the model has {list(current.shape)}.")
        return tensor.to(current.dtype)

    def parameter(name: str, ghost: nn.Parameter) -> nn.Parameter:
        if name not in needed:
            return ghost
        return nn.Parameter(fitting(name, ghost), requires_grad=ghost.requires_grad)

    replace_parameters(model, parameter)
    for prefix, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            name = f"{prefix}.{key}" if prefix else key
            if name in needed:
                module._buffers[key] = fitting(name, buffer)


def load_block(path: Path, dtype: torch.dtype, device: torch.device) -> BlockWeights:
    """The weights of a block file; those that are there already, as long as somebody holds on to them.

    Raises ArtifactError for a broken file, StorageError for an unreadable one, OutOfMemoryError.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    key = (path.resolve(), state.st_ino, state.st_mtime_ns, state.st_size, dtype, device)
    with _loading:
        loaded = _in_use.get(key)
        if loaded is None:
            with memory_errors():
                loaded = _in_use[key] = BlockWeights(path, dtype, device)
        return loaded


def _map_file(path: Path, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they lie in the file. One that will be copied is let go of before the next one is read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            layout = read_layout(file, size, path.name)
            # Some models' code changes weights in place: then a page of our own takes the place of the file's.
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise _unreadable(path, error) from error
    if device.type != "cpu" or any(DTYPES.get(spec.dtype) != dtype for spec in layout.specs if spec.dtype in FLOATING):
        return _copied_tensors(path, pages, layout)
    # Large pages, and all of the file now rather than in the first step; a system may know neither.
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), MADV_POPULATE_READ):
        if advice is not None:
            with suppress(OSError, ValueError):
                pages.madvise(advice)
    return _tensors(path, pages, layout)


def _copied_tensors(path: Path, pages: mmap.mmap, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """Each is used before the next is asked for; then the system need not keep its pages for us."""
    ends = iter(layout.tensors)
    for name, tensor in _tensors(path, pages, layout):
        yield name, tensor
        del tensor
        end = next(ends).end // mmap.PAGESIZE * mmap.PAGESIZE
        if end and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError, ValueError):
                pages.madvise(mmap.MADV_DONTNEED, 0, end)


def _tensors(path: Path, pages: mmap.mmap, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    for placed in layout.tensors:
        spec = placed.tensor
        dtype = DTYPES.get(spec.dtype)
        if dtype is None:
            raise ArtifactError(f"{path.name} holds {spec.dtype} tensors, which this version cannot compute with.")
        count = (placed.end - placed.start) // dtype.itemsize
        if count:
            yield spec.name, aligned(view_of(pages, dtype, count, placed.start)).view(spec.shape)
        else:
            yield spec.name, torch.empty(spec.shape, dtype=dtype)


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"The block file {path} cannot be read ({error.strerror}); check the data folder.")
