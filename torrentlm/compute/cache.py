"""A session's state on one holder: the model's own cache class with all its layers, real where the span computes.

Where a model keeps its state in anything else than transformers' caches, nothing is kept but the token ids so far, at
the stem: every step then runs the whole text again (*replay*).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
)

from torrentlm.compute.inputs import Encoded
from torrentlm.compute.reserved import ReservedLayer
from torrentlm.errors import RefusedError

SNAPSHOTS = 4
"""Steps that can be undone where a layer's state cannot be cut short."""


@dataclass(eq=False)
class SpanCache:
    """One session's state in one span. ``length`` tokens per row are in it, of at most ``max_length``;
    ``broken`` after a step that failed half-way. ``states`` is None where every step replays the text.

    ``attention_mask`` and ``position_ids``, int64 [batch, max_length], are what ``generate`` would build for these
    paddings; the mask is None where no row is padded, as there. A row begins with ``pads[row]`` tokens of padding, or
    ends with as many where that is negative. ``encoded`` is what the encoder made, for a decoder.
    """

    batch: int
    max_length: int
    pads: tuple[int, ...]
    device: torch.device
    make: Callable[[], LayeredCache | None]
    encoded: Encoded | None = None
    length: int = 0
    broken: bool = False
    ids: torch.Tensor | None = None
    layered: LayeredCache | None = field(init=False)
    attention_mask: torch.Tensor | None = field(init=False)
    position_ids: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.layered = self.make()
        self._follow_pads()

    def _follow_pads(self) -> None:
        pads = torch.tensor(self.pads, device=self.device)[:, None]
        steps = torch.arange(self.max_length, device=self.device)[None, :]
        self.position_ids = (steps - pads.clamp(min=0)).clamp_(min=0)
        inside = (steps >= pads) & (steps < self.max_length + pads.clamp(max=0))
        self.attention_mask = inside.long() if any(self.pads) else None

    @property
    def states(self) -> Cache | None:
        return None if self.layered is None else self.layered.cache

    def before_step(self, ids: torch.Tensor | None) -> None:
        """Remember what the next step may have to be undone to; ``ids`` [batch, n] are its tokens at the stem."""
        if self.layered is not None:
            self.layered.take_snapshot(self.length)
        elif ids is not None:
            self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)

    def undo_step(self) -> None:
        """Be as before a step that failed half-way, in some layers and not in others."""
        if self.length == 0:
            self.layered = self.make()
        elif self.layered is not None:
            self.layered.undo(self.length)
        if self.ids is not None:
            self.ids = self.ids[:, : self.length] if self.length else None

    def trim(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens; RefusedError where a layer has already dropped
        what it needs. All can be forgotten always.
        """
        surplus = self.length - length
        if surplus <= 0:
            return
        if length == 0:
            self.layered = self.make()
        elif self.layered is not None:
            self.layered.trim(surplus, length)
        if self.ids is not None:
            self.ids = self.ids[:, :length]
        self.length = length

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        index = torch.tensor(list(rows), device=self.device)
        if self.layered is not None:
            self.layered.reorder(index)
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index)
        if any(self.pads):
            self.pads = tuple(self.pads[row] for row in rows)
            self._follow_pads()
        if self.encoded is not None:
            states, mask = self.encoded.states, self.encoded.mask
            self.encoded = Encoded(states.index_select(0, index), mask.index_select(0, index))


class LayeredCache:
    """A transformers cache of which the entries ``own`` are real. The others are stand-ins that only know lengths,
    since the model's code asks them: ``earlier`` ones grow when the span begins, ``later`` ones when it is done.
    """

    def __init__(
        self, cache: Cache, own: frozenset[int], earlier: frozenset[int], later: frozenset[int], max_length: int
    ) -> None:
        self.cache = cache
        grows = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        groups: tuple[dict[object, Any], ...] = ({}, {})
        for index, layer in enumerate(grows.layers):
            if isinstance(layer, DummyLayer):
                continue
            if index in earlier or index in later:
                kind = (type(layer), getattr(layer, "sliding_window", None))
                grows.layers[index] = groups[index not in earlier].setdefault(kind, layer)
            elif index in own and type(layer) is DynamicLayer:
                grows.layers[index] = ReservedLayer(max_length)
        self._own = [layer for index, layer in enumerate(grows.layers) if index in own]
        self._crossed = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else None
        self._stand_ins = tuple(tuple(group.values()) for group in groups)
        self._snapshots: deque[tuple[int, list[tuple[Any, dict[str, Any]]]]] = deque(maxlen=SNAPSHOTS)

    def grow_earlier(self, tokens: int, device: torch.device) -> None:
        self._grow(0, tokens, device)

    def grow_later(self, tokens: int, device: torch.device) -> None:
        self._grow(1, tokens, device)
        for layer in self._own:
            _drop_slack(layer)

    def _grow(self, group: int, tokens: int, device: torch.device) -> None:
        for layer in self._stand_ins[group]:
            if isinstance(layer, DynamicLayer):
                nothing = torch.empty((1, 1, tokens, 1), device=device)
                layer.update(nothing, nothing)
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)

    def _layers(self) -> Iterator[Any]:
        """Every real layer and every stand-in, once."""
        for layer in (*self._own, *self._stand_ins[0], *self._stand_ins[1]):
            if not isinstance(layer, DummyLayer):
                yield layer

    def take_snapshot(self, length: int) -> None:
        kept = [(layer, _copied(layer)) for layer in self._layers() if not isinstance(layer, ReservedLayer)]
        self._snapshots.append((length, kept))

    def trim(self, surplus: int, length: int) -> None:
        layers = list(self._layers())
        if self.cache.is_croppable and all(_can_crop(layer) for layer in layers):
            for layer in layers:
                layer.crop(-surplus)
            self._snapshots.clear()
            return
        kept = next((kept for at, kept in self._snapshots if at == length), None)
        if kept is None:
            raise RefusedError(
                "The model keeps no more than its latest state: this session can only begin again at position 0.",
                "bad_request",
            )
        _put_back(kept)
        for layer in layers:
            if isinstance(layer, ReservedLayer):
                layer.crop(-surplus)
        self._snapshots = deque((entry for entry in self._snapshots if entry[0] <= length), maxlen=SNAPSHOTS)

    def undo(self, length: int) -> None:
        """Take back the step behind ``length`` tokens, of which a snapshot was taken."""
        _, kept = self._snapshots.pop()
        _put_back(kept)
        for layer in self._layers():
            if isinstance(layer, ReservedLayer) and (surplus := layer.get_seq_length() - length) > 0:
                layer.crop(-surplus)

    def reorder(self, index: torch.Tensor) -> None:
        for layer in self._own:
            layer.reorder_cache(index)
        for layer in [] if self._crossed is None else self._crossed.layers:
            if getattr(layer, "is_initialized", False):
                layer.reorder_cache(index)
        self._snapshots.clear()


def _put_back(kept: list[tuple[Any, dict[str, Any]]]) -> None:
    for layer, attributes in kept:
        layer.__dict__.update({name: _cloned(value) for name, value in attributes.items()})


def _drop_slack(layer: Any) -> None:
    """A window's keys and values are views of all that were ever in one step, and would keep these in memory."""
    for name in ("keys", "values") if getattr(layer, "sliding_window", None) is not None else ():
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes:
            setattr(layer, name, tensor.clone())


_CROPS = (ReservedLayer, DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer)
"""Layers of which all that is known is keys and values. A model's own kind may keep more, which ``crop`` leaves."""


def can_always_crop(layer: Any) -> bool:
    """Whether a layer's state can be cut at any token, however many there are."""
    return isinstance(layer, DummyLayer) or (type(layer) in _CROPS and not layer.is_sliding)


def _can_crop(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return can_always_crop(layer)


def _copied(layer: Any) -> dict[str, Any]:
    """The layer's attributes. transformers replaces the tensors of growing layers; others may overwrite theirs."""
    replaces = type(layer) in _CROPS
    return {name: _kept(value) if replaces else _cloned(value) for name, value in vars(layer).items()}


def _kept(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list) else value


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value
