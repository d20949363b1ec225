"""Who this node is: an Ed25519 key pair (RFC 8032), used for hellos on the pipe and for BEP 44 items alike."""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from torrentlm.records import NodeKey

SEED_BYTES = 32


class Identity:
    """A node's key pair. ``node`` is the public key (32 bytes); the seed goes nowhere but to the key file."""

    def __init__(self, seed: bytes) -> None:
        """``seed``: the 32 secret bytes of RFC 8032 section 5.1.5; raises ValueError for another length."""
        self._seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.node = NodeKey(self._private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        return cls(secrets.token_bytes(SEED_BYTES))

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``data``."""
        return self._private.sign(data)

    @property
    def seed(self) -> bytes:
        return self._seed

    @property
    def expanded_key(self) -> bytes:
        """The 64-byte secret key that libtorrent wants for BEP 44: SHA-512 of the seed, clamped (RFC 8032)."""
        digest = bytearray(hashlib.sha512(self._seed).digest())
        digest[0] &= 0b1111_1000
        digest[31] = (digest[31] & 0b0011_1111) | 0b0100_0000
        return bytes(digest)

    def __repr__(self) -> str:
        return f"Identity({self.node.hex()[:16]}…)"


def verify(node: NodeKey, signature: bytes, data: bytes) -> bool:
    """Whether ``signature`` is ``node``'s over ``data``; malformed keys and signatures are simply not valid."""
    try:
        Ed25519PublicKey.from_public_bytes(node).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
