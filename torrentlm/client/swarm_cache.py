"""A session on the holders in the place where transformers' generation keeps its KV-cache: only its length is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from transformers.cache_utils import Cache

from torrentlm.errors import LocalProtocolError

DEFAULT_LENGTH = 512
"""Tokens per row that a cache has room for when nobody said."""


class Steps(Protocol):
    """A session in stepping mode, as torrentlm.api.Session is one."""

    def step(
        self,
        ids: Sequence[Sequence[int]],
        *,
        position: int | None = None,
        last_only: bool = False,
        reorder: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """B rows of n ids in, logits [B, n, vocabulary] out; [B, 1, vocabulary] with ``last_only``."""

    def close(self) -> None:
        """Free what the holders keep."""


Opener = Callable[[int, int, Sequence[int]], Steps]
"""Opens a session for (rows, tokens per row, left padding of each row)."""


class SwarmCache(Cache):  # type: ignore[misc]
    """What ``past_key_values`` is in the swarm. Rows and left padding are settled by the first step, which opens the
    session; reordering and cropping travel with the next step. Use it in a ``with``, or call :meth:`close`.
    """

    def __init__(self, opener: Opener, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self._opener = opener
        self._session: Steps | None = None
        self._pads: list[int] = []
        self._length = 0
        self._picked: list[int] | None = None
        self.closed = False

    # Steps

    def step(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """Feed int [B, n] and return the logits of the last ``keep`` tokens (0: of all).

        ``mask`` [B, tokens so far and new ones] and ``positions`` [B or 1, n] must say what left padding says, since
        holders make their own from that. Raises ValueError where they do not, and as torrentlm.api.Session.step.
        """
        rows, count = ids.shape
        session = self._begun(rows, count, mask)
        self._check(rows, count, mask, positions)
        keep = min(keep, count)
        if 1 < keep < count:  # the logits before these may be many, and nobody asked for them
            self._step(session, ids[:, :-keep], last_only=True)
            return self._step(session, ids[:, -keep:], last_only=False)
        return self._step(session, ids, last_only=keep == 1)

    def _step(self, session: Steps, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        try:
            logits = session.step(ids.tolist(), position=self._length, last_only=last_only, reorder=self._picked)
        except (ValueError, TypeError):  # nothing was sent
            raise
        except BaseException:
            if self._picked is not None:  # some holders may have reordered, others not
                self.close()
            raise
        self._picked = None
        self._length += ids.shape[1]
        return logits

    def _begun(self, rows: int, count: int, mask: torch.Tensor | None) -> Steps:
        if self.closed:
            raise LocalProtocolError(
                "this cache is closed: to go on after a generate(), make one first with new_cache(max_length=...) "
                "and pass it as past_key_values"
            )
        if self._session is None:
            if not self._pads:
                self.begin(rows, mask)
            if self.max_length is None:
                self.max_length = max(DEFAULT_LENGTH, count)
            self._session = self._opener(rows, self.max_length, self._pads)
        return self._session

    def begin(self, rows: int, mask: torch.Tensor | None) -> None:
        """Settle the padding of an empty cache's ``rows`` from the whole prompt's ``mask``. ValueError if no row may
        be padded so.
        """
        if self._session is not None:
            return
        if mask is None:
            self._pads = [0] * rows
            return
        self._pads = [int(row.long().argmax()) for row in mask.cpu()]
        if not bool(mask.bool().any(dim=1).all()):
            raise ValueError("attention_mask hides a whole row: give every row a token")

    def _check(self, rows: int, count: int, mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        if rows != len(self._pads):
            raise ValueError(f"this cache has {len(self._pads)} rows, not {rows}: make another with new_cache()")
        pads = torch.tensor(self._pads)[:, None]
        places = torch.arange(self._length + count)[None, :]
        real = places >= pads
        if mask is None:
            fits = not any(self._pads)
        else:
            fits = mask.dim() == 2 and mask.shape == real.shape and torch.equal(mask.cpu().bool(), real)
        if not fits:
            raise ValueError(
                "attention_mask must have a column for each token, cached ones too, and hide left padding alone: set "
                "padding_side='left' in the tokenizer"
            )
        if positions is not None:
            new = slice(self._length, None)
            given = positions.cpu()
            if given.dim() != 2 or given.shape[1] != count or given.shape[0] not in (1, rows):
                raise ValueError(f"position_ids are 1 or {rows} rows of {count} numbers: leave them out")
            if not bool((given.expand(rows, count) == places[:, new] - pads)[real[:, new]].all()):
                raise ValueError("position_ids must count a row's tokens from its padding on: leave them out")

    # What generation asks of a cache

    def __bool__(self) -> bool:
        return True  # it has no layers here, and still is one

    def __repr__(self) -> str:
        return f"SwarmCache({self._length} of {self.max_length} tokens in each of {len(self._pads)} rows)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._length > 0

    @property
    def batch_size(self) -> int:
        return len(self._pads) or -1

    @property
    def is_initialized(self) -> bool:
        return self._session is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def activate_past_recording(self) -> None:
        """Nothing to do: a holder that cannot go back says so when it is asked to."""

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("keys and values are with the holders: only the swarm's own forward can use this cache")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i go on from row ``beam_idx[i]``, with the next step."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As :meth:`reorder_cache`; ValueError for another number of rows, which a session cannot have."""
        rows = [int(row) for row in indices]
        if len(rows) != len(self._pads):
            raise ValueError(f"the swarm's cache keeps its {len(self._pads)} rows: pick one for each, not {len(rows)}")
        self._pads = [self._pads[row] for row in rows]
        before = self._picked or list(range(len(rows)))
        picked = [before[row] for row in rows]
        self._picked = None if picked == list(range(len(rows))) else picked

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to do in an empty cache; ValueError once rows are cached."""
        if self._length and repeats != 1:
            raise ValueError("the swarm's cache cannot grow in rows: begin with as many as are needed")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every row."""
        if not -self._length <= tokens_to_remove <= 0:
            raise ValueError(f"crop() takes a number from {-self._length} to 0: how many tokens to forget, negative")
        self._length += tokens_to_remove

    def reset(self) -> None:
        """Forget everything: the next step opens another session."""
        if self._session is not None:
            self._session.close()
        self._session, self._pads, self._length, self._picked = None, [], 0, None

    def close(self) -> None:
        """Free what the holders keep for it; it cannot be used again."""
        self.closed = True
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
