"""transformers' growing cache layer, with the room for all of a session's tokens reserved at once."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """The stock layer copies all keys and values with every token; this one writes the new ones behind the old.

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
