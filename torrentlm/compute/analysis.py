"""One attempt to cut a model at one list of layers: its code is run on ghosts, and what was seen becomes a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
)

from torrentlm.compute.border import BorderShape, Carried, Returned, Slot, TensorShape, TokenIds
from torrentlm.compute.cache import can_always_crop
from torrentlm.compute.inputs import FILLER, Encoded, Inputs
from torrentlm.compute.probe import Inside, Kept, Pass, Probe, SeenCarried, Weight, entries_of
from torrentlm.compute.sizes import Point, Size
from torrentlm.compute.split import Call, CarriedValue, Split, State, named_weights
from torrentlm.compute.stack import Stack
from torrentlm.errors import RefusedError, UnsupportedModelError

FIRST, SECOND, THIRD = Point(2, 5, source=11, last=True), Point(3, 7, source=6), Point(2, 10, source=8)
MORE, ONE = Point(2, 2, past=5, source=11), Point(2, 1, past=5, source=11)
"""The steps that are watched; MORE and ONE go on behind FIRST. What differs tells the axes of a border."""


def _name_weights(model: nn.Module) -> tuple[dict[int, str], tuple[tuple[str, str], ...]]:
    """Canonical names by the weight's storage, and the pairs (alias, canonical name)."""
    names: dict[int, str] = {}
    tied: list[tuple[str, str]] = []
    for name, weight in named_weights(model):
        storage = weight.untyped_storage()._cdata
        if storage in names:
            tied.append((name, names[storage]))
        else:
            names[storage] = name
    return names, tuple(tied)


class Analysis:
    """One attempt: this stack of layers, with the model's cache or without."""

    def __init__(
        self, model: PreTrainedModel, module: str, inputs: Inputs, stack: Stack, width: int | None, with_cache: bool
    ) -> None:
        self._model = model
        self._module = module
        self._stack = stack
        self._inputs = inputs
        self._width = width
        self._chunks = True
        self._names, self._tied = _name_weights(model)
        self._probe = Probe(model, model.get_submodule(module), stack, self._names)
        self._make_cache: Callable[[PretrainedConfig], Cache] | None = None
        self._states: list[State] = []
        if with_cache:
            make = self._make_cache = self._find_cache()
            self._passes = self._with_cache(make, SECOND)
            for behind in (MORE, ONE):
                self._passes += self._with_cache(make, FIRST, behind)
            self._chunks = self._goes_on_in_parts()
        else:
            self._passes = [self._run(point, None) for point in (FIRST, SECOND, THIRD)]

    def split(self) -> Split:
        self._require_alike()
        passes = self._passes
        calls = tuple(
            Call(seen.path, seen.form, seen.maps, _shapes([(one.point, one.calls[number].tensors) for one in passes]))
            for number, seen in enumerate(passes[0].calls)
        )
        reads = [_union(one.calls[number].reads for one in passes) for number in range(len(calls))]
        head = _union(one.head for one in passes)
        carried = self._carried()
        parts = [*reads, head]
        for number, part in enumerate(parts):
            self._refuse_escapes(number, part)
        stem = _union(value.sources for one in passes for value in one.carried)
        return Split(
            module=self._module,
            layer_stack=self._stack.path,
            calls=calls,
            stem=self._weights(stem),
            head=self._weights(head),
            extra=tuple(
                tuple(name for name in self._weights(part) if not name.startswith(f"{call.path}."))
                for call, part in zip(calls, reads, strict=True)
            ),
            tied=self._tied,
            inputs=self._inputs,
            make_cache=self._make_cache,
            state=tuple(self._states) or (State(),) * len(calls),
            carried=carried,
            borders=tuple(self._border(number, parts, calls, carried) for number in range(len(parts))),
            chunks=self._chunks,
            width=self._width,
        )

    # Running

    def _run(self, point: Point, cache: Cache | None, *, use_cache: bool = False) -> Pass:
        ids = torch.full((point.batch, point.tokens), FILLER)
        positions = torch.arange(point.past, point.length)[None].expand(point.batch, -1)
        encoded = None
        if self._width is not None:
            mask = torch.ones(point.batch, point.source, dtype=torch.long)
            encoded = Encoded(torch.zeros(*mask.shape, self._width), mask)
        try:
            arguments = self._inputs.arguments(
                self._model, point, ids, cache, positions=positions, mask=None, encoded=encoded
            )
        except RefusedError as error:
            raise UnsupportedModelError(str(error)) from error
        if use_cache:
            arguments["use_cache"] = True
        return self._probe.run(point, arguments, self._inputs.ids, self._inputs.output)

    def _find_cache(self) -> Callable[[PretrainedConfig], Cache]:
        """Which argument is the cache, and what makes one: seen from what the model makes when it is given none."""
        if not self._inputs.use_cache:
            raise UnsupportedModelError("The model keeps no state.")
        result = self._run(FIRST, None, use_cache=True).result
        caches = [(name, value) for name, value in result.items() if isinstance(value, Cache)]
        if len(caches) != 1 or caches[0][0] not in self._inputs.takes:
            raise UnsupportedModelError("The model keeps its state in something else than one of transformers' caches.")
        name, cache = caches[0]
        self._inputs = replace(self._inputs, cache=name)
        return _maker(cache)

    def _with_cache(self, make: Callable[[PretrainedConfig], Cache], *points: Point) -> list[Pass]:
        cache = make(self._model.config)
        passes = []
        for point in points:
            try:
                passes.append(self._run(point, cache))
            except UnsupportedModelError:
                if point != MORE:  # where that fails, the model takes one token at a time behind a prompt
                    raise
            if not point.past:
                self._measure(cache, point)
        return passes

    def _goes_on_in_parts(self) -> bool:
        """Whether several tokens behind a prompt read all the state that a single one reads."""

        def kept(one: Pass) -> list[set[Kept]]:
            named = (self._probe.sources.named(call.reads) for call in one.calls)
            return [{source for source in sources if isinstance(source, Kept)} for sources in named]

        single = next(one for one in self._passes if one.point == ONE)
        several = next((one for one in self._passes if one.point == MORE), None)
        return several is not None and all(few <= many for few, many in zip(kept(single), kept(several), strict=False))

    def _measure(self, cache: Cache, point: Point) -> None:
        """Who keeps what. The second time, sizes at two points tell what grows with the text."""
        entries: dict[int, list[int]] = {}
        numbers: dict[int, int] = {}
        for index, entry in enumerate(entries_of(cache)):
            tensors = [tensor for tensor in _tensors_of(entry) if tensor.numel() > 1]
            owners = self._probe.owners(entry)
            if owners and type(entry) is DynamicLayer and entry.get_seq_length() != point.length:
                raise UnsupportedModelError("The model's cache grows by another number of tokens than the text.")
            if len(owners) > 1 or (tensors and not owners):
                raise UnsupportedModelError(f"Entry {index} of the model's cache belongs to no single layer call.")
            for owner in owners:
                entries.setdefault(owner, []).append(index)
                numbers[owner] = numbers.get(owner, 0) + sum(tensor.numel() for tensor in tensors)
        calls = range(max(entries, default=-1) + 1)
        if point == SECOND:
            self._second_numbers = numbers
            return
        self._states = []
        for call in calls:
            one = numbers.get(call, 0) / point.batch
            other = self._second_numbers.get(call, 0) / SECOND.batch
            per_token = max(0, int((other - one) // (SECOND.tokens - point.tokens)))
            per_row = max(0, int(one - per_token * point.tokens))
            kept = tuple(entries.get(call, ()))
            trims = all(can_always_crop(entries_of(cache)[index]) for index in kept)
            crossed = sum(_numel(_crossed(cache, index)) for index in kept)
            per_source = crossed // (point.batch * point.source) if point.source else 0
            windows = [getattr(entries_of(cache)[index], "sliding_window", None) for index in kept]
            window = max((size or 0 for size in windows), default=0) if all(windows) else 0
            self._states.append(State(kept, per_token, per_source, per_row, trims, window or None))

    # What was seen

    def _require_alike(self) -> None:
        first = self._passes[0]
        for one in self._passes[1:]:
            if [(call.path, call.form, call.maps) for call in one.calls] != [
                (call.path, call.form, call.maps) for call in first.calls
            ]:
                raise UnsupportedModelError("Which layers the model calls, or what they return, changes with the text.")
        count = len(first.calls)
        self._states += [State()] * (count - len(self._states)) if self._make_cache else []

    def _carried(self) -> tuple[CarriedValue, ...]:
        """What any of the passes carried: a mask may be left out where it masks nothing."""
        seen: dict[Carried, list[tuple[Point, SeenCarried]]] = {}
        for one in self._passes:
            for value in one.carried:
                seen.setdefault(value.slot, []).append((one.point, value))
        values = []
        for slot, found in seen.items():
            places = {tuple(value.places) for _, value in found}
            if len(places) != 1:
                raise UnsupportedModelError("What the stem passes to the layers changes with the text.")
            shape = _shapes([(point, (value.tensor,)) for point, value in found])[0]
            values.append(CarriedValue(slot, places.pop(), shape))
        return tuple(sorted(values, key=lambda value: (value.slot.call, list(map(str, value.slot.place)))))

    def _weights(self, sources: int) -> tuple[str, ...]:
        read = {source.name for source in self._probe.sources.named(sources) if isinstance(source, Weight)}
        return tuple(name for name in self._names.values() if name in read)

    def _refuse_escapes(self, number: int, sources: int) -> None:
        part = "The head" if number == len(self._passes[0].calls) else f"Layer call {number}"
        for source in self._probe.sources.named(sources):
            if isinstance(source, Inside):
                raise UnsupportedModelError(f"{part} reads what layer call {source.call} made and did not return.")

    def _border(
        self, number: int, parts: list[int], calls: tuple[Call, ...], carried: tuple[CarriedValue, ...]
    ) -> BorderShape:
        """Whatever part ``number`` or a later one reads of the parts before."""
        wanted = set(self._probe.sources.named(_union(parts[number:])))
        slots: list[Slot] = [
            slot
            for call in range(number)
            for index in range(len(calls[call].tensors))
            if (slot := Returned(call, index)) in wanted
        ]
        slots += [
            value.slot for value in carried if any(call >= number for call, _ in value.places) and value.slot in wanted
        ]
        if TokenIds() in wanted:
            slots.append(TokenIds())
        return BorderShape(tuple(slots), tuple(_shape(slot, calls, carried) for slot in slots))


def _shape(slot: Slot, calls: tuple[Call, ...], carried: tuple[CarriedValue, ...]) -> TensorShape:
    match slot:
        case Returned(call, index):
            return calls[call].tensors[index]
        case Carried():
            return next(value.shape for value in carried if value.slot == slot)
        case TokenIds():
            return TensorShape((Size("batch", 1), Size("tokens", 1)), torch.int64)


def _shapes(seen: list[tuple[Point, tuple[torch.Tensor, ...]]]) -> tuple[TensorShape, ...]:
    """The shapes of tensors that were seen at several points."""
    shapes = []
    points = [point for point, _ in seen]
    for tensors in zip(*(tensors for _, tensors in seen), strict=True):
        if len({(tensor.dim(), tensor.dtype) for tensor in tensors}) != 1:
            raise UnsupportedModelError("What the layers return changes its structure with the number of tokens.")
        sizes = tuple(
            Size("?")  # seen once: nobody knows
            if len(points) == 1
            else Size.of([(point, tensor.shape[axis]) for point, tensor in zip(points, tensors, strict=True)])
            for axis in range(tensors[0].dim())
        )
        shapes.append(TensorShape(sizes, tensors[0].dtype))
    return tuple(shapes)


def _union(sources: Iterable[int]) -> int:
    result = 0
    for one in sources:
        result |= one
    return result


def _tensors_of(entry: Any) -> Iterator[torch.Tensor]:
    for value in vars(entry).values():
        for part in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(part, torch.Tensor):
                yield part


def _crossed(cache: Cache, index: int) -> Any:
    return cache.cross_attention_cache.layers[index] if isinstance(cache, EncoderDecoderCache) else None


def _numel(entry: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors_of(entry)) if entry is not None else 0


def _maker(cache: Cache) -> Callable[[PretrainedConfig], Cache]:
    """What makes an empty cache like this one, as the model's own code would have."""
    kind = type(cache)
    if kind is DynamicCache:
        return lambda config: DynamicCache(config=config)
    if kind is not EncoderDecoderCache:
        raise UnsupportedModelError(f"The model keeps its state in a {kind.__name__}, a cache of its own.")
    crossed = cache.cross_attention_cache.layers
    if any(type(layer) is not DynamicLayer for layer in crossed):
        return lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    count = len(crossed)

    def make(config: PretrainedConfig) -> Cache:
        plain = DynamicCache()
        plain.layers.extend(DynamicLayer() for _ in range(count))
        return EncoderDecoderCache(DynamicCache(config=config), plain)

    return make
