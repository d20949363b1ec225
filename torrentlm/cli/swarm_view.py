"""What ``torrentlm seed`` heard so far from its events (docs/cli.md): plain state, and each event as a line of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torrentlm.cli import text


@dataclass
class SwarmView:
    """The state behind the display. ``apply`` takes one event; keys that an event lacks keep their last value."""

    name: str = ""
    magnet: str = ""
    port: int = 0
    blocks: list[int] = field(default_factory=list)
    blocks_total: int = 0
    what: str = ""
    done: int = 0
    total: int = 0
    rate: float = 0.0
    left: float | None = None
    download: float = 0.0
    upload: float = 0.0
    peers: dict[str, str] = field(default_factory=dict)
    sessions: int = 0
    waiting: str = ""
    proof: str = ""
    warning: str = ""
    ready: bool = False
    adapters: dict[str, str] = field(default_factory=dict)

    def apply(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "adapter":
            self.adapters[str(event.get("name"))] = str(event.get("magnet"))
            return
        for key in ("name", "magnet", "port", "blocks_total", "sessions", "download", "upload"):
            if key in event:
                setattr(self, key, event[key])
        if kind == "waiting":
            self.waiting = str(event.get("why", ""))
        elif kind in ("joined", "progress", "ready", "peer"):
            self.waiting = ""  # somebody answered
        if kind == "progress":
            self.what = str(event.get("what", ""))
            self.done, self.total = int(event.get("done", 0)), int(event.get("total", 0))
            self.rate = float(event.get("rate", 0.0))
            self.left = event.get("left_s")
        elif kind == "published":
            self.proof = text.proof(event["proof"]) if event.get("proof") else ""
        elif kind in ("rechecked", "device"):
            self.warning = str(event.get("why", ""))
        elif kind == "ready":
            self.ready, self.what = True, ""
            self.blocks = list(event.get("blocks", []))
        elif kind == "peer":
            if event.get("connected", True):
                self.peers[str(event.get("peer"))] = text.blocks(event.get("blocks", []))
            else:
                self.peers.pop(str(event.get("peer")), None)

    def _step(self) -> tuple[str, int]:
        """What of a progress is worth a line of its own: the kind of work, and each tenth of it."""
        return self.what.partition(" ")[0], self.done * 10 // self.total if self.total else -1

    def line_for(self, event: dict[str, Any]) -> str | None:
        """Apply ``event`` and say it in one line; None if it is worth none (progress only at each tenth)."""
        before, waited = self._step(), self.waiting
        self.apply(event)
        match event.get("event"):
            case "published":
                left_out = event.get("left_out", ())
                aside = f" ({text.left_out(left_out)})" if left_out else ""
                proof = f"\nProof: {self.proof}" if self.proof else ""
                return f"Published {self.name}{aside}: {self.magnet}{proof}"
            case "precision" if event.get("why"):
                why = str(event["why"])
                return f"{why[0].upper()}{why[1:]}"
            case "rechecked" | "device" if self.warning:
                return f"Warning: {self.warning}"
            case "adapter":
                return f"Published the adapter {event.get('name')}: {event.get('magnet')}"
            case "starting":
                return f"Listening on port {self.port}"
            case "joined":
                return f"Joined {self.name}: {text.count(self.blocks_total, 'block')}"
            case "waiting" if self.waiting != waited:
                return f"Waiting: {self.waiting}"
            case "progress" if before != self._step():
                of_all = f": {text.size(self.done)} of {text.size(self.total)}" if self.total > 1 else ""
                return f"{self.what.capitalize()}{of_all}"
            case "ready":
                return f"Ready on port {self.port} with {text.blocks(self.blocks)}: {self.magnet}"
            case "peer":
                gone = not event.get("connected", True)
                return f"Peer {event.get('peer')} {'left' if gone else 'has ' + text.blocks(event.get('blocks', []))}"
            case "session":
                return f"Session {event.get('state', 'open')}; {text.count(self.sessions, 'session')} now"
            case "stopped":
                return "Stopped"
        return None
