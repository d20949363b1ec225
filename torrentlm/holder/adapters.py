"""How a holder gets at the adapters that sessions bring along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torrentlm.errors import RefusedError
from torrentlm.records import AdapterId, Span


@dataclass(frozen=True, slots=True)
class Borrowed:
    """What an adapter has for a span: files on this node's disk, with prefixes as in the manifest, and scalings.

    The files stay until ``give_back`` is called, once.
    """

    files: tuple[tuple[Path, tuple[tuple[str, str], ...]], ...]
    scalings: Mapping[str, float]
    give_back: Callable[[], None]


class Adapters(Protocol):
    """Where adapters come from; the node knows."""

    async def borrow(self, model: bytes, adapter: AdapterId, span: Span) -> Borrowed:
        """Get what ``adapter`` has for blocks of ``model``; takes a limited time. Raises RefusedError."""


class NoAdapters:
    """For a holder whose operator has not asked for adapters."""

    async def borrow(self, model: bytes, adapter: AdapterId, span: Span) -> Borrowed:
        raise RefusedError("this holder applies no adapters: its settings do not allow any", "no_adapter")
