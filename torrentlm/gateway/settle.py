"""Which of the connections between two nodes are too many. A pure decision, made by the pipe's leader alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torrentlm.records import InfoHash


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connection as the leader sees it; ``number`` grows with every connection."""

    number: int
    torrent: InfoHash
    attached: bool
    dialed: bool


def surplus(candidates: Sequence[Candidate]) -> set[int]:
    """Numbers of the connections to close.

    One stays per torrent that is in transfer; one without BitTorrent messages stays only if there is no other. Of
    equals the one that the leader dialed stays, then the oldest.
    """
    keep: dict[InfoHash | None, Candidate] = {}
    attached = any(candidate.attached for candidate in candidates)
    for candidate in sorted(candidates, key=lambda c: (not c.dialed, c.number)):
        if candidate.attached:
            keep.setdefault(candidate.torrent, candidate)
        elif not attached:
            keep.setdefault(None, candidate)
    kept = {candidate.number for candidate in keep.values()}
    return {candidate.number for candidate in candidates} - kept
