"""Nodes with real keys, for handshakes."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from torrentlm.records import NodeKey
from torrentlm.wire.frames import Hello
from torrentlm.wire.handshake import CarrierHandshake

INFO_HASH = bytes(range(20))


def verify(node: NodeKey, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(node).verify(signature, message)
    except InvalidSignature:
        return False
    return True


class Node:
    """A real key, and the handshakes of its carriers."""

    def __init__(self, seed: int, **hello: int) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.node = NodeKey(self.key.public_key().public_bytes_raw())
        self.hello = hello

    def carrier(
        self, *, dialer: bool, nonce: int = 0, info_hash: bytes = INFO_HASH, generation: int = 0
    ) -> CarrierHandshake:
        hello = Hello(self.node, bytes([nonce]) * 32, b"instance", 6881, "test/1", **self.hello)
        return CarrierHandshake(
            hello,
            dialer=dialer,
            info_hash=info_hash,
            sign=self.key.sign,
            verify=verify,
            generation=lambda _: generation,
        )
