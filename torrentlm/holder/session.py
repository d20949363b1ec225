"""The life of one session on one holder, as pure decisions: which steps may run, which are stale, when it ends.

::

             Open                Step of the next position             Halt(epoch)
    (none) ────────▶ idle ◀─────────────────────────────▶ running ────────────────▶ idle, epochs ≤ epoch are stale
                       │                                     │
                       └── Close, lease run out, failure ────┴────▶ gone (the KV-cache is freed)

An *epoch* is one unbroken run of steps. Whatever breaks the run (a stop, a cancel, a roll-back, the next turn,
another route) starts a higher one, and a step of a higher epoch first trims the cache to the position that it names.
So a late step of an older epoch is harmless, and a step that arrives twice runs once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torrentlm.errors import RefusedError
from torrentlm.records import NodeKey, SessionId, Span
from torrentlm.wire.messages import NextHop


@dataclass(slots=True)
class Session:
    """One session's state on one holder. Times in seconds of the owner's clock.

    ``position`` counts the tokens per row of all admitted steps. The KV-cache may be shorter (a step that went stale
    in the queue never ran), but never shorter than what the client has seen the effect of, and a new epoch starts no
    later than there.
    """

    id: SessionId
    client: NodeKey
    span: Span
    has_stem: bool
    prev: frozenset[NodeKey]
    next: NextHop | None
    batch: int
    max_length: int
    pads: tuple[int, ...]
    lease_s: float
    expires: float
    epoch: int = 0
    position: int = 0
    halted: int = field(default=-1)

    def renew(self, now: float) -> None:
        self.expires = now + self.lease_s

    def halt(self, epoch: int) -> bool:
        """Make steps of ``epoch`` and below stale; False if they already were."""
        if epoch <= self.halted:
            return False
        self.halted = epoch
        return True

    def is_stale(self, epoch: int) -> bool:
        """Whether the result of a step of ``epoch`` may no longer leave this holder."""
        return epoch <= self.halted or epoch < self.epoch

    def may_send_steps(self, sender: NodeKey) -> bool:
        """Authority is per holder: only the predecessor that the client named, and the client."""
        return sender == self.client or sender in self.prev

    def admit(self, sender: NodeKey, epoch: int, position: int, tokens: int) -> bool:
        """Whether a step of ``tokens`` new tokens per row is to run; if so it is accounted for.

        Raises RefusedError if the step can never run: not from the predecessor, past ``max_length``, or with a gap
        before it.
        """
        if not self.may_send_steps(sender):
            raise RefusedError("this peer may not send steps to this session", "bad_request")
        if self.is_stale(epoch):
            return False
        if epoch > self.epoch and self.has_stem and sender != self.client:
            raise RefusedError("only the client begins another epoch", "bad_request")
        if epoch == self.epoch and position < self.position:
            return False  # a step that arrived twice
        if position > self.position:
            raise RefusedError(
                f"the step starts at position {position}, but this session holds {self.position} tokens", "bad_request"
            )
        if position + tokens > self.max_length:
            raise RefusedError(
                f"the text would reach {position + tokens} tokens, but this session was opened for {self.max_length}: "
                "ask for fewer new tokens or open a longer session",
                "max_length",
            )
        self.epoch = epoch
        self.position = position + tokens
        return True
