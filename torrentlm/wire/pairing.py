"""Which pipe an authenticated carrier belongs to: at most one living pipe per node. No I/O.

Two nodes may disagree whether their pipe still lives: one closes it while its BYE is lost, or restarts. Frame numbers
of a dead pipe must never meet those of a new one, so a pipe is known by a pair of *generations*, one chosen by each end
and signed in its PROOF: how many pipes with that peer this process has closed before. A higher generation, or another
process (HELLO's instance), starts a new pipe at both ends; a lower one belongs to a handshake that a newer pipe has
overtaken.
"""

from __future__ import annotations

from dataclasses import dataclass

from torrentlm.errors import RemoteProtocolError
from torrentlm.records import NodeKey
from torrentlm.wire.frames import Hello
from torrentlm.wire.handshake import Authenticated
from torrentlm.wire.pipe import PipeCore
from torrentlm.wire.streams import Limits

MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Admission:
    """``core`` has the carrier now. ``is_new``: it was made for it, and took the place of ``replaced`` if that is not
    None.

    ``replaced`` is dead: whoever waits for it learns that the peer lost it.
    """

    core: PipeCore
    is_new: bool
    replaced: PipeCore | None


class PipeTable:
    """The living pipes of one node, by peer. Owner of their generations."""

    def __init__(self, own: NodeKey, limits: Limits | None = None) -> None:
        self._own = own
        self._limits = limits
        self._cores: dict[NodeKey, PipeCore] = {}
        self._generations: dict[NodeKey, int] = {}  # of nodes whose pipe was closed, oldest entry first
        self._floor = 0  # generation of every node not listed there

    def get(self, node: NodeKey) -> PipeCore | None:
        """The living pipe with a node."""
        return self._cores.get(node)

    def generation(self, hello: Hello) -> int:
        """What our PROOF says to this peer; pass it to CarrierHandshake."""
        core = self._cores.get(hello.node)
        return core.generation if core else self._generations.get(hello.node, self._floor)

    def admit(self, carrier: int, established: Authenticated) -> Admission:
        """Give a carrier whose handshake is done to its pipe, a new one if need be.

        :raises RemoteProtocolError: a newer pipe has overtaken this handshake; close the carrier, nothing else.
        """
        peer = established.peer
        if established.generation != self.generation(peer):
            raise RemoteProtocolError("the pipe that this connection was meant for has been closed since")
        old = self._cores.get(peer.node)
        if old is not None and old.peer.instance == peer.instance:
            if established.peer_generation < old.peer_generation:
                raise RemoteProtocolError("the peer has started a newer pipe since")
            if established.peer_generation == old.peer_generation:
                old.carrier_opened(carrier)
                return Admission(old, is_new=False, replaced=None)
        core = self._cores[peer.node] = PipeCore(self._own, established, self._limits)
        core.carrier_opened(carrier)
        return Admission(core, is_new=True, replaced=old)

    def forget(self, core: PipeCore) -> None:
        """This pipe is closed, by either end: the next one with this node is another. Idempotent."""
        node = core.peer.node
        if self._cores.get(node) is not core:
            return
        del self._cores[node]
        self._generations.pop(node, None)
        self._generations[node] = core.generation + 1
        if len(self._generations) > MAX_REMEMBERED:
            oldest = next(iter(self._generations))
            self._floor = max(self._floor, self._generations.pop(oldest))
