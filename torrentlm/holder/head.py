"""What the head's holder does with logits: pick tokens, check the stops and the budget, say what to send on.

Pure: logits in, :class:`Emission` out. The picked token is a function of (logits, history, sampling, seed, position,
row) alone, so it does not depend on the route, the batch's other rows or anything that happened before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torrentlm.compute.sampling import Sampler
from torrentlm.compute.stopping import StopChecker
from torrentlm.wire.messages import Generate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Emission:
    """One sampled token per row. ``index`` counts from 0 at ``emit_from``; ``finish`` is None while the run goes on."""

    index: int
    tokens: tuple[int, ...]
    finish: str | None


class HeadRun:
    """One generation (one epoch of one session) at the head."""

    def __init__(
        self, order: Generate, *, batch: int, max_length: int, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.order = order
        self._max_length = max_length
        # What a row that has ended is fed while the others go on; nobody reads what comes of it.
        self._filler = next(iter(order.stop.tokens), 0)
        self._sampler = Sampler(order.sampling, batch=batch)
        if order.history is not None:
            self._sampler.seen(order.history)
        self._stops = [StopChecker(order.stop, tokenizer) for _ in range(batch)]
        self._finished: list[str | None] = [None] * batch

    def emit(self, logits: torch.Tensor, length: int) -> Emission:
        """Sample after ``length`` tokens per row; ``logits`` [rows, vocabulary] of the last position, any float
        dtype.
        """
        index = length - 1 - self.order.emit_from
        picked = self._sampler.pick(logits, length)
        tokens: list[int] = []
        for row, token in enumerate(picked):
            if self._finished[row] is not None:
                tokens.append(self._filler)
                continue
            tokens.append(token)
            self._finished[row] = self._stops[row].push(token)
        finish = None
        if all(self._finished):
            finish = self._finished[0]
        elif index + 1 >= self.order.max_new_tokens or length + 1 > self._max_length:
            finish = "length"
        return Emission(index, tuple(tokens), finish)
