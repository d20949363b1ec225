"""Weights straight from block files: each tensor is a view of the file's pages, shared by all processes that map it.

A tensor is copied only where its dtype, its device or its alignment must change, and then one after the other.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import nn

from torrentlm.compute.border import DTYPES, aligned, view_of
from torrentlm.compute.device import memory_errors
from torrentlm.compute.offload import Offload
from torrentlm.compute.quantization.kept import find, keep, key_of
from torrentlm.compute.quantization.narrow import AS_PUBLISHED, LEAST, Narrow
from torrentlm.compute.quantization.recipe import quantized
from torrentlm.compute.quantization.tensor import QuantizedTensor, moved
from torrentlm.compute.skeleton import replace_parameters
from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import FLOATING, Layout, read_layout

Names = Sequence[tuple[str, str]]
"""(prefix in the file, prefix in the model): to the model a tensor's name begins with the second instead."""

BlockFiles = Iterable[tuple[Path, Names]]
"""Block files and what the model calls their tensors."""

Convert = Callable[[Mapping[str, torch.Tensor]], Iterable[tuple[str, torch.Tensor]]]
"""Makes the model's tensors of a block file's."""

_CPU = torch.device("cpu")
MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it yet


@dataclass(frozen=True, slots=True)
class Quantization:
    """Block files, by name, that are kept as INT8 or INT4, or ``AS_PUBLISHED``, which is as they lie in the file
    (``kinds``); ``cache`` is the folder to keep them in on disk, if any.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None


class BlockWeights:
    """One block file's tensors by their names in the file, in one dtype on one device; as they lie in the file where
    ``dtype`` is None. Nothing may write to them.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        self.name = path.name
        self.tensors = {
            name: tensor if dtype is None else _to(tensor, dtype, device)
            for name, tensor in map_file(path, dtype, device)
        }
        self._converted: dict[frozenset[str], dict[str, torch.Tensor]] = {}

    def converted(self, named: Mapping[str, torch.Tensor], convert: Convert) -> dict[str, torch.Tensor]:
        """``convert(named)``, made once for all spans that call the tensors the same."""
        names = frozenset(named)
        with _loading:
            if names not in self._converted:
                self._converted[names] = dict(convert(named))
            return self._converted[names]


class QuantizedWeights:
    """A block's tensors by their names in the model; matrices are kept in INT8 or INT4, or in the file's own type.

    Made tensor by tensor from a mapped file: at no time are there two copies of more than one.
    """

    def __init__(
        self,
        file: BlockWeights,
        named: Mapping[str, torch.Tensor],
        convert: Convert,
        how: How,
    ) -> None:
        self.name = file.name
        if how.kind == AS_PUBLISHED:
            self.tensors = {name: _narrow(tensor, how) for name, tensor in convert(named)}
            return
        kept = key_of(file.name, {**dict.fromkeys(named, False), **how.matrices}, how.kind, how.dtype)
        found = None if how.cache is None else find(how.cache, kept, how.dtype, map_file)
        if found is not None:
            self.tensors = {name: moved(tensor, how.home) for name, tensor in found.items()}
            return
        self.tensors = {}
        for name, tensor in convert(named):
            whole = _to(tensor, how.dtype, how.home) if name not in how.matrices else tensor.to(how.device)
            if name in how.matrices:
                whole = moved(quantized(whole, how.kind, how.dtype, how.matrices[name]), how.home)
            self.tensors[name] = whole
        if how.cache is not None:
            keep(how.cache, kept, self.tensors)


@dataclass(frozen=True, slots=True)
class How:
    """How a block is quantized: which of its tensors in the model may be, and whether they lie turned; on ``device``,
    and then kept on ``keep_on``, if that is another.
    """

    kind: str
    matrices: Mapping[str, bool]
    dtype: torch.dtype
    device: torch.device
    cache: Path | None
    keep_on: torch.device | None = None

    @property
    def home(self) -> torch.device:
        return self.keep_on or self.device


_in_use: WeakValueDictionary[tuple[object, ...], BlockWeights | QuantizedWeights] = WeakValueDictionary()
"""Files are named by their content, so spans and models that share a file share its one copy in memory."""
_loading = threading.Lock()


class Weights:
    """The weights of a span under the model's names, floating point ones in ``dtype``, all on ``device``.

    ``matrices`` are the model's names of what may be quantized, and whether it lies as [in, out]; they are where
    ``quantization`` says so. Files that are offloaded are loaded already. Raises ArtifactError for a broken file or a
    tensor that gets no name, StorageError for an unreadable file.
    """

    def __init__(
        self,
        files: BlockFiles,
        dtype: torch.dtype,
        device: torch.device,
        convert: Convert = lambda named: named.items(),
        quantization: Quantization | None = None,
        matrices: Mapping[str, bool] | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._files: list[BlockWeights | QuantizedWeights] = []
        for path, names in files:
            if offload is not None and (block := offload.blocks.get(path.name)) is not None:
                self.tensors |= offload.stage.tensors(block)
                continue
            kind = None if quantization is None else quantization.kinds.get(path.name)
            if kind is None or quantization is None:
                file = load_block(path, dtype, device)
                self.tensors |= file.converted(_named(file, names), convert)
                self._files.append(file)
            else:
                made = load_quantized(
                    path, names, convert, How(kind, matrices or {}, dtype, device, quantization.cache)
                )
                self.tensors |= made.tensors
                self._files.append(made)


def _named(file: BlockWeights, names: Names) -> dict[str, torch.Tensor]:
    """A file's tensors as the model calls them; ArtifactError if one gets no name."""
    unnamed = set(file.tensors)
    named: dict[str, torch.Tensor] = {}
    for here, there in names:
        for name in filter(lambda name: name.startswith(here), file.tensors):
            named[there + name.removeprefix(here)] = file.tensors[name]
            unnamed.discard(name)
    if unnamed:
        raise ArtifactError(f"{file.name} holds the tensor {min(unnamed)}, which the manifest does not mention.")
    return named


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
        tensor = fitting(name, ghost)
        return nn.Parameter(tensor, requires_grad=ghost.requires_grad and not isinstance(tensor, QuantizedTensor))

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
    which = (*_state(path), dtype, device)
    with _loading:
        loaded = _in_use.get(which)
        if not isinstance(loaded, BlockWeights):
            with memory_errors():
                loaded = _in_use[which] = BlockWeights(path, dtype, device)
        return loaded


def load_quantized(path: Path, names: Names, convert: Convert, how: How) -> QuantizedWeights:
    """As ``load_block``, for a block that is kept in fewer bits, under the model's names."""
    which = (*_state(path), tuple(map(tuple, names)), how.kind, how.dtype, how.device, how.home)
    prefixes = tuple(there for _, there in names)
    with _loading:
        loaded = _in_use.get(which)
        if not isinstance(loaded, QuantizedWeights):
            file = BlockWeights(path, None, how.device)
            own = {name: turned for name, turned in how.matrices.items() if name.startswith(prefixes)}
            with memory_errors():
                loaded = QuantizedWeights(file, _named(file, names), convert, replace(how, matrices=own))
            _in_use[which] = loaded
        return loaded


def read_block(path: Path, names: Names, convert: Convert, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block under the model's names, in ``dtype`` in the processor's memory; each is made when it is
    asked for, or lies in the file. Raises as ``load_block``.
    """
    for name, tensor in convert(_named(BlockWeights(path, None, _CPU), names)):
        yield name, _to(tensor, dtype, _CPU)


def _state(path: Path) -> tuple[object, ...]:
    """What tells a file from the one that was there before."""
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return path.resolve(), state.st_ino, state.st_mtime_ns, state.st_size


def _to(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _narrow(tensor: torch.Tensor, how: How) -> torch.Tensor:
    """``tensor`` as it is, to compute with in a wider type; a small one becomes wide."""
    if not tensor.is_floating_point() or tensor.dtype == how.dtype or tensor.numel() < LEAST:
        return _to(tensor, how.dtype, how.device)
    return QuantizedTensor(Narrow(tensor.to(how.device)), how.dtype)


def map_file(
    path: Path, dtype: torch.dtype | None = None, device: torch.device = _CPU
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as they lie in the file, to be used as ``dtype`` on ``device``; ``dtype`` None: as they lie there.

    One that will be copied is let go of before the next one is read. Raises ArtifactError for a broken file,
    StorageError for an unreadable one.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            layout = read_layout(file, size, path.name)
            # Some models' code changes weights in place: then a page of our own takes the place of the file's.
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise _unreadable(path, error) from error
    differs = any(DTYPES.get(spec.dtype) != dtype for spec in layout.specs if spec.dtype in FLOATING)
    if dtype is not None and (device.type != "cpu" or differs):
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
