"""A session on one device, with what it needs to run."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from torrentlm.holder.adapters import Borrowed
from torrentlm.holder.execution import Execution
from torrentlm.holder.memory import Pins
from torrentlm.holder.session import Session
from torrentlm.wire.messages import Step


@dataclass(slots=True)
class Live:
    """A session with what it needs to run."""

    session: Session
    execution: Execution
    kv_bytes: int
    queue: trio.MemorySendChannel[Step]
    pin: Pins
    borrowed: Borrowed | None = None
    queued_bytes: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    changed: trio.Event = field(default_factory=trio.Event)

    def wake(self) -> None:
        """An order or a halt came: whoever waits for either looks again."""
        self.changed.set()
        self.changed = trio.Event()
