"""The extended handshake in both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.bencode import decode, encode
from torrentlm.errors import LocalProtocolError, RemoteProtocolError
from torrentlm.wire.extension import MAX_HANDSHAKE, PIPE_ID, PIPE_NAME, bare_offer, make_offer, read_offer

LIBTORRENT = encode(
    {"m": {"ut_metadata": 2, "upload_only": 3, "ut_pex": 1, "ut_holepunch": 4}, "reqq": 500, "v": "libtorrent/2.1.1"}
)


def fields(payload: bytes) -> dict[bytes, object]:
    read = decode(payload, max_size=MAX_HANDSHAKE)
    assert isinstance(read, dict)
    return dict(read)


def test_ours_offers_the_pipe_and_the_real_port_and_no_peer_exchange() -> None:
    assert fields(make_offer(LIBTORRENT, 6881)) == {
        b"m": {b"ut_metadata": 2, b"upload_only": 3, PIPE_NAME: PIPE_ID},
        b"p": 6881,
        b"reqq": 500,
        b"v": b"libtorrent/2.1.1",
    }


def test_a_wrong_port_is_corrected() -> None:
    assert fields(make_offer(encode({"m": {}, "p": 1}), 6881))[b"p"] == 6881


def test_theirs_goes_on_without_the_pipe_and_peer_exchange() -> None:
    offer = read_offer(make_offer(LIBTORRENT, 6881))
    assert offer.pipe_id == PIPE_ID
    assert fields(offer.payload)[b"m"] == {b"ut_metadata": 2, b"upload_only": 3}
    assert fields(read_offer(LIBTORRENT).payload)[b"m"] == {b"ut_metadata": 2, b"upload_only": 3}


def test_one_of_a_plain_client_passes_byte_for_byte() -> None:
    for payload in (encode({"m": {"ut_metadata": 3}, "v": "x"}), b"d1:v1:x1:mde1:ai1ee", encode({"v": "x"})):
        assert read_offer(payload).payload == payload
        assert read_offer(payload).pipe_id is None


def test_an_id_of_zero_takes_the_pipe_back() -> None:
    assert read_offer(encode({"m": {PIPE_NAME: 0}})).pipe_id is None


def test_what_follows_the_dictionary_is_kept() -> None:
    assert make_offer(encode({"m": {}}) + b"rest", 1).endswith(b"erest")
    assert read_offer(encode({"m": {"ut_pex": 1}}) + b"rest").payload == encode({"m": {}}) + b"rest"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"le",
        b"d1:m1:xe",
        b"d1:md" + PIPE_NAME,
        encode({"m": {PIPE_NAME: 256}}),
        encode({"m": {PIPE_NAME: -1}}),
        encode({"m": {PIPE_NAME: b"1"}}),
        encode({"v": "x" * MAX_HANDSHAKE}),
    ],
)
def test_what_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_offer(payload)


def test_our_id_must_be_free() -> None:
    with pytest.raises(LocalProtocolError):
        make_offer(encode({"m": {"other": PIPE_ID}}), 6881)


def test_bare_offer() -> None:
    assert read_offer(bare_offer(6881)).pipe_id == PIPE_ID
    assert fields(bare_offer(6881))[b"p"] == 6881


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_passes(payload: bytes) -> None:
    try:
        offer = read_offer(payload)
    except RemoteProtocolError:
        return
    assert offer.payload == payload
