"""The greeting of one carrier: HELLO and PROOF both ways, after which both ends know whom they speak with.

A PROOF signs a transcript that names the signer's role, the connection's info-hash and both HELLOs with their fresh
nonces, so that it cannot be replayed on another connection, moved to another torrent or reflected to its sender. The
states, seen from one end::

    greeted   our HELLO is queued                        a HELLO arrives   -> queue our PROOF, -> proving
    proving   we know the claimed key                    a PROOF verifies  -> authenticated
    authenticated                                        frames belong to the pipe from here on
    failed    any other frame, a wrong signature, no common version, or our own key at the other end

What the handshake does not give is protection against somebody *on* the path: frames after it are neither encrypted nor
signed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.records import NodeKey
from torrentlm.wire.frames import MAX_HELLO, Hello, Proof, decode_frame, encode_frame

Sign = Callable[[bytes], bytes]
Verify = Callable[[NodeKey, bytes, bytes], bool]
"""(key, message, signature) -> whether it is that key's signature."""

_CONTEXT = b"TorrentLM carrier proof 1\0"


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A carrier's other end is who it says; ``generation`` and ``peer_generation`` are those of the two PROOFs."""

    peer: Hello
    generation: int
    peer_generation: int
    version: int


class CarrierHandshake:
    """Drives one carrier until its peer is authenticated. Frames in, frames out; time limits are the caller's.

    ``info_hash`` is the 20 bytes that the *dialer* of the TCP connection sent in its BEP 3 handshake. ``generation`` is
    asked once, when the peer's HELLO has come: see PipeTable.generation.
    """

    def __init__(
        self,
        hello: Hello,
        *,
        dialer: bool,
        info_hash: bytes,
        sign: Sign,
        verify: Verify,
        generation: Callable[[Hello], int],
    ) -> None:
        if len(info_hash) != 20:
            raise LocalProtocolError("the info-hash of a carrier has 20 bytes")
        self.peer: Hello | None = None
        """The other end's HELLO once it has come: claimed, not proven, until ``result`` is set."""
        self.result: Authenticated | None = None
        self._hello = hello
        self._hello_frame = encode_frame(hello)
        self._dialer = dialer
        self._info_hash = info_hash
        self._sign = sign
        self._verify = verify
        self._ask_generation = generation
        self._generation = 0
        self._peer_frame = b""
        self._out: deque[bytes] = deque([self._hello_frame])

    @property
    def is_self(self) -> bool:
        """The other end turned out to be this very node: do not dial that address again."""
        return self.peer is not None and self.peer.node == self._hello.node

    def next_frame(self) -> bytes | None:
        """The next frame to send, or None. Everything must be sent before the first frame of the pipe."""
        return self._out.popleft() if self._out else None

    def receive_frame(self, data: bytes | bytearray | memoryview) -> Authenticated | None:
        """Take one frame; return the result once the peer is authenticated. RemoteProtocolError ends the carrier."""
        if self.result is not None:
            raise LocalProtocolError("the handshake of this carrier is over; its frames belong to the pipe")
        if len(data) > MAX_HELLO:
            raise RemoteProtocolError("the first frames on a carrier are HELLO and PROOF")
        frame = decode_frame(data)
        if isinstance(frame, Hello) and self.peer is None:
            self._greeted(frame, bytes(data))
        elif isinstance(frame, Proof) and self.peer is not None:
            return self._proven(self.peer, frame)
        else:
            raise RemoteProtocolError(f"a {type(frame).__name__} frame came where HELLO and then PROOF were due")
        return None

    def _greeted(self, peer: Hello, data: bytes) -> None:
        self.peer, self._peer_frame = peer, data
        if self.is_self:
            raise RemoteProtocolError("the other end of this connection is this node itself")
        if min(peer.version, self._hello.version) < max(peer.oldest, self._hello.oldest):
            raise RemoteProtocolError(f"the peer speaks wire versions {peer.oldest} to {peer.version}, none of ours")
        self._generation = self._ask_generation(peer)
        signature = self._sign(self._transcript(self._dialer, self._generation))
        self._out.append(encode_frame(Proof(self._generation, signature)))

    def _proven(self, peer: Hello, proof: Proof) -> Authenticated:
        if not self._verify(peer.node, self._transcript(not self._dialer, proof.generation), proof.signature):
            raise RemoteProtocolError("the peer's signature does not match the key that it claims")
        version = min(peer.version, self._hello.version)
        self.result = Authenticated(peer, self._generation, proof.generation, version)
        return self.result

    def _transcript(self, dialer_signs: bool, generation: int) -> bytes:
        hellos = (self._hello_frame, self._peer_frame)
        by_dialer, by_acceptor = hellos if self._dialer else reversed(hellos)
        parts = [_CONTEXT, b"D" if dialer_signs else b"A", self._info_hash, generation.to_bytes(4)]
        for frame in (by_dialer, by_acceptor):
            parts += [len(frame).to_bytes(2), frame]
        return b"".join(parts)
