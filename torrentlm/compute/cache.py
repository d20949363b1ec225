"""A session's KV-cache on one holder: the model's own cache class with all its layers, real where the span computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer

from torrentlm.errors import RefusedError


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' growing layer, with the room for all of a session's tokens reserved at once.

    The stock layer copies all keys and values with every token; this one writes the new ones behind the old.
    Reserved pages cost memory only once they are written.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._all_keys = self._reserve(key_states)
        self._all_values = self._reserve(value_states)
        self._show(0)
        self.is_initialized = True

    def _reserve(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty((batch, heads, self._max_length, width))

    def _show(self, length: int) -> None:
        self._length = length
        self.keys = self._all_keys.narrow(2, 0, length)
        self.values = self._all_values.narrow(2, 0, length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self._length, key_states.shape[2]
        self._all_keys.narrow(2, start, new).copy_(key_states)
        self._all_values.narrow(2, start, new).copy_(value_states)
        self._show(start + new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_initialized:
            self._show(self._length - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._length:
            self.keys.copy_(self.keys.index_select(0, beam_idx))
            self.values.copy_(self.values.index_select(0, beam_idx))


@dataclass(eq=False)
class SpanCache:
    """One session's state in one span. ``length`` tokens per row are in it, of at most ``max_length``;
    ``broken`` after a step that failed half-way.

    ``attention_mask`` and ``position_ids``, int64 [batch, max_length], are what ``generate`` would build for
    these left paddings; the mask is None where no row is padded, as there.
    """

    batch: int
    max_length: int
    pads: tuple[int, ...]
    states: DynamicCache
    own: tuple[int, ...]
    earlier: tuple[DynamicLayer, ...]
    later: tuple[DynamicLayer, ...]
    device: torch.device
    length: int = 0
    broken: bool = False
    attention_mask: torch.Tensor | None = field(init=False)
    position_ids: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._follow_pads()

    def _follow_pads(self) -> None:
        pads = torch.tensor(self.pads, device=self.device)[:, None]
        steps = torch.arange(self.max_length, device=self.device)[None, :]
        self.position_ids = (steps - pads).clamp_(min=0)
        self.attention_mask = (steps >= pads).long() if any(self.pads) else None

    @classmethod
    def open(
        cls,
        config: PretrainedConfig,
        own: range,
        batch: int,
        max_length: int,
        pads: Sequence[int],
        device: torch.device,
    ) -> SpanCache:
        """An empty cache for ``batch`` rows of at most ``max_length`` tokens, of which the first ``pads[row]``
        are padding.
        """
        states = DynamicCache(config=config)
        groups: tuple[dict[object, DynamicLayer], ...] = ({}, {})
        for index, layer in enumerate(states.layers):
            if index in own:
                if type(layer) is DynamicLayer:
                    states.layers[index] = ReservedLayer(max_length)
            elif isinstance(layer, DynamicLayer):
                kind = (type(layer), getattr(layer, "sliding_window", None))
                states.layers[index] = groups[index >= own.stop].setdefault(kind, layer)
        earlier, later = (tuple(group.values()) for group in groups)
        return cls(batch, max_length, tuple(pads), states, tuple(own), earlier, later, device)

    def grow(self, stand_ins: tuple[DynamicLayer, ...], tokens: int) -> None:
        """Let the stand-ins of foreign layers see ``tokens`` more: the model's code asks them for lengths."""
        for layer in stand_ins:
            nothing = torch.empty((1, 1, tokens, 1), device=self.device)
            layer.update(nothing, nothing)

    def trim(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens; RefusedError where a layer has already dropped
        what it needs.
        """
        surplus = self.length - length
        if surplus <= 0:
            return
        if any(getattr(layer, "sliding_window", self.length + 1) <= self.length for layer in self._layers()):
            raise RefusedError("The model's sliding window has moved on: this session cannot go back.", "bad_request")
        for layer in self._layers():
            layer.crop(-surplus)
        self.length = length

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        index = torch.tensor(list(rows), device=self.device)
        for position in self.own:
            self.states.layers[position].reorder_cache(index)
        if any(self.pads):
            self.pads = tuple(self.pads[row] for row in rows)
            self._follow_pads()

    def _layers(self) -> Iterator[DynamicLayer]:
        """Every real layer and every stand-in, once."""
        yield from self.earlier
        yield from (layer for i in self.own if not isinstance(layer := self.states.layers[i], DummyLayer))
        yield from self.later
