"""Watching a model's own forward run on ghosts: which calls of its layers there are, and what each part of it reads.

Theory of operation. The layers of a stack are called one after the other. Everything that runs is watched by
``Provenance``; what a call returns is cut: later operations see it as a source of its own. So the sources of what call
k returns are the weights that run between the return of call k-1 and its own, and those *earlier returned tensors* that
it needs. The same goes for what the head makes. Arguments of a call that come from the token ids and from no layer are
cut too (*carried*): the stem makes them all, and nobody else needs its weights for them. What runs between the calls
(*glue*) every holder runs for itself; what runs inside a call is seen by others only through its return value, and
through maps among its arguments that it writes to. A value that gets out in any other way is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from torrentlm.compute.border import Carried, Returned, TokenIds
from torrentlm.compute.provenance import Provenance, Sources
from torrentlm.compute.sizes import Point
from torrentlm.compute.skeleton import GhostProducts, first_line
from torrentlm.compute.stack import Stack
from torrentlm.compute.values import Place, at, flatten, mutable_maps, rebuild, replace_at, tensors_at
from torrentlm.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as a source, by its canonical name."""

    name: str


@dataclass(frozen=True, slots=True)
class Inside:
    """Made while this call ran, and not returned."""

    call: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that an entry of the cache held before the step."""

    entry: int
    place: Place


@dataclass(frozen=True, slots=True)
class MapEntry:
    """An entry that a call puts into a map: where the map hangs in (positional, keyword arguments), the entry's key,
    the form of its value and the number of tensors in it.
    """

    place: Place
    key: Any
    form: Any
    count: int


@dataclass(slots=True)
class SeenCall:
    """One layer call: the module, the form of its return value and the tensors in it, then those it put into maps."""

    path: str
    form: Any = None
    maps: tuple[MapEntry, ...] = ()
    tensors: tuple[torch.Tensor, ...] = ()
    reads: int = 0


@dataclass(slots=True)
class SeenCarried:
    """A carried value: the places (call, place in its arguments) that get it, its sources, one sample."""

    slot: Carried
    places: list[tuple[int, Place]]
    sources: int
    tensor: torch.Tensor


@dataclass
class Pass:
    """What one forward showed. ``head`` are the sources of the output."""

    point: Point
    calls: list[SeenCall] = field(default_factory=list)
    carried: list[SeenCarried] = field(default_factory=list)
    head: int = 0
    result: Any = None


class Probe:
    """Runs ``forward`` (the model's own, given keyword arguments) on ghosts and records a :class:`Pass` each time.

    ``names`` gives the canonical name of each weight by its storage.
    """

    def __init__(
        self, model: PreTrainedModel, forward: Callable[..., Any], stack: Stack, names: Mapping[int, str]
    ) -> None:
        self.sources = Sources()
        self._model = model
        self._forward = forward
        self._stack = stack
        self._names = names
        self._provenance = Provenance(GhostProducts(model).compute)
        self._pass: Pass
        self._cache: Any

    def run(self, point: Point, arguments: Mapping[str, Any], ids: str, output: str) -> Pass:
        """One forward with these arguments, of which the one called ``ids`` holds the tokens and the others are known
        to every holder. Raises UnsupportedModelError where it fails or cannot be cut.
        """
        self._pass = Pass(point)
        self._cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
        watch = self._provenance
        watch.forget()
        for name, weight in _weights(self._model, self._names):
            watch.mark(weight, self.sources.bit(Weight(name)))
        watch.mark(arguments[ids], self.sources.bit(TokenIds()))
        for index, entry in enumerate(() if self._cache is None else entries_of(self._cache)):
            for place, tensor in tensors_at(vars(entry)):
                watch.mark(tensor, self.sources.bit(Kept(index, place)))
        try:
            with self._watched_layers(), torch.no_grad(), watch:
                result = self._forward(**arguments)
        except UnsupportedModelError:
            raise
        except Exception as error:  # any model's own code runs here
            raise UnsupportedModelError(f"The model's forward fails without weights: {first_line(error)}") from error
        seen = self._pass
        if not seen.calls:
            raise UnsupportedModelError("The model calls none of its layers one by one.")
        made = getattr(result, output, None)
        if not isinstance(made, torch.Tensor):
            raise UnsupportedModelError(f"The model's forward returns no {output}.")
        seen.head, seen.result = watch.of(made), result
        return seen

    def owners(self, entry: Any) -> set[int]:
        """The calls that wrote to a cache entry in the latest run."""
        sources = 0
        for _, tensor in tensors_at(vars(entry)):
            sources |= self._provenance.of(tensor)
        return {source.call for source in self.sources.named(sources) if isinstance(source, Inside)}

    @contextmanager
    def _watched_layers(self) -> Iterator[None]:
        originals = [(module, module.__dict__.get("forward")) for _, module in self._stack.layers]
        for path, module in self._stack.layers:
            module.forward = self._watched(path, module.forward)
        try:
            yield
        finally:
            for module, own in originals:
                del module.forward
                if own is not None:
                    module.forward = own

    def _watched(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self._pass.calls)
            inside = self.sources.bit(Inside(number))
            seen = SeenCall(path)
            self._pass.calls.append(seen)
            args, kwargs = self._carry(number, args, kwargs)
            with self._provenance.within(inside):
                output = forward(*args, **kwargs)
            tensors, seen.form = flatten(output)
            entries, written = self._written(args, kwargs, inside)
            everything = (*tensors, *written)
            seen.maps, seen.tensors = entries, everything
            for tensor in everything:
                seen.reads |= self._provenance.of(tensor) & ~inside
            cut = [self._cut(tensor, Returned(number, index)) for index, tensor in enumerate(everything)]
            put_entries(entries, args, kwargs, cut[len(tensors) :], self._cache)
            return rebuild(cut[: len(tensors)], seen.form, self._cache)

        return call

    def _written(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], inside: int
    ) -> tuple[tuple[MapEntry, ...], list[torch.Tensor]]:
        """What the call that is just over has put into maps among its arguments."""
        entries, written = [], []
        for place, found in mutable_maps(args, kwargs):
            for key, value in found.items():
                if any(self._provenance.of(tensor) & inside for _, tensor in tensors_at(value)):
                    tensors, form = flatten(value)
                    entries.append(MapEntry(place, key, form, len(tensors)))
                    written += tensors
        return tuple(entries), written

    def _carry(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments, those that come from the token ids alone as sources of their own."""
        replacements: dict[Place, torch.Tensor] = {}
        for place, tensor in tensors_at((args, kwargs)):
            sources = self._provenance.of(tensor)
            kinds = {type(source) for source in self.sources.named(sources)}
            if TokenIds not in kinds or kinds - {TokenIds, Weight}:
                continue
            value = self._carried_already(tensor)
            if value is None:
                value = SeenCarried(Carried(number, place), [], sources, tensor)
                self._pass.carried.append(value)
            value.places.append((number, place))
            replacements[place] = self._cut(tensor, value.slot)
        return replace_at((args, kwargs), replacements)

    def _carried_already(self, tensor: torch.Tensor) -> SeenCarried | None:
        """Whether the same value is carried already, for an earlier call or under another name."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        for value in self._pass.carried:
            known = value.tensor
            if (known.data_ptr(), known.shape, known.stride(), known.dtype) == key:
                return value
        return None

    def _cut(self, tensor: torch.Tensor, source: Returned | Carried) -> torch.Tensor:
        copy = tensor.clone()
        self._provenance.mark(copy, self.sources.bit(source))
        return copy


def put_entries(
    entries: Sequence[MapEntry],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor | None],
    cache: Any,
) -> None:
    """Put what a call wrote to the maps among its arguments there, made of these tensors."""
    start = 0
    for entry in entries:
        value = rebuild(tensors[start : start + entry.count], entry.form, cache)
        at((args, kwargs), entry.place)[entry.key] = value
        start += entry.count


def entry_tensors(entries: Sequence[MapEntry], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call has put into the maps among its arguments, in the entries' order."""
    return [tensor for entry in entries for tensor in flatten(at((args, kwargs), entry.place)[entry.key])[0]]


def _weights(model: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    done = set()
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()._cdata
        if storage in names and storage not in done:
            done.add(storage)
            yield names[storage], tensor


def entries_of(cache: Cache) -> list[Any]:
    """The layers of a cache that grow with the text."""
    grows = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return list(grows.layers)
