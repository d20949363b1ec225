"""Node keys: signatures, and the expanded key that BEP 44 signing in libtorrent needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.records import NodeKey
from torrentlm.swarm.identity import Identity, verify

# RFC 8032, section 7.1, TEST 2
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_rfc_vector() -> None:
    identity = Identity(SEED)
    assert (identity.node, identity.sign(b"\x72")) == (PUBLIC, SIGNATURE)
    assert verify(identity.node, SIGNATURE, b"\x72")


def test_expanded_key_is_clamped() -> None:
    expanded = Identity(SEED).expanded_key
    assert len(expanded) == 64
    assert expanded[0] & 0b111 == 0
    assert expanded[31] & 0b1100_0000 == 0b0100_0000


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_malformed_keys_and_signatures_are_not_valid(key: bytes, signature: bytes) -> None:
    assert not verify(NodeKey(key), signature, b"data")
    assert not verify(NodeKey(PUBLIC), signature, b"data")


def test_other_data_or_key_is_not_valid() -> None:
    identity = Identity.generate()
    signature = identity.sign(b"data")
    assert verify(identity.node, signature, b"data")
    assert not verify(identity.node, signature, b"date")
    assert not verify(Identity.generate().node, signature, b"data")


def test_seed_length() -> None:
    with pytest.raises(ValueError, match="32"):
        Identity(b"short")


def test_repr_keeps_the_secret() -> None:
    assert SEED.hex()[:8] not in repr(Identity(SEED))
