from __future__ import annotations

import base64

import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest.magnet import MAX_PEERS, Magnet
from torrentlm.records import Endpoint

V1, V2 = bytes(range(20)), bytes(range(32))
HOSTS = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str) | st.sampled_from(["localhost", "a.example"])
MAGNETS = st.builds(
    Magnet,
    st.binary(min_size=20, max_size=20),
    st.none() | st.binary(min_size=32, max_size=32),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.lists(st.builds(Endpoint, HOSTS, st.integers(1, 65535)), max_size=4, unique=True).map(tuple),
)


@given(MAGNETS)
def test_round_trip(magnet: Magnet) -> None:
    parsed = Magnet.parse(str(magnet))
    assert (parsed.v1, parsed.v2, parsed.name, parsed.peers) == (magnet.v1, magnet.v2, magnet.name, magnet.peers)
    assert str(parsed) == str(magnet)


@given(st.text(max_size=80).map(lambda rest: "magnet:?" + rest) | st.text(max_size=20))
def test_anything_else_is_an_artifact_error(text: str) -> None:
    try:
        magnet = Magnet.parse(text)
    except ArtifactError:
        return
    assert magnet.v1 or magnet.v2


def test_form_and_libtorrent_agree() -> None:
    magnet = Magnet(V1, V2, "A model/ä", (Endpoint("127.0.0.1", 6881), Endpoint("::1", 7)))
    text = str(magnet)
    assert text == (
        f"magnet:?xt=urn:btih:{V1.hex()}&xt=urn:btmh:1220{V2.hex()}"
        "&dn=A%20model%2F%C3%A4&x.pe=127.0.0.1:6881&x.pe=[::1]:7"
    )
    params = lt.parse_magnet_uri(text)
    assert params.info_hashes.v1.to_bytes() == V1
    assert params.info_hashes.v2.to_bytes() == V2
    assert ("127.0.0.1", 6881) in params.peers


def test_identity_is_the_hashes_alone() -> None:
    assert Magnet(V1, V2, "a", (Endpoint("h", 1),)) == Magnet(V1, V2, "b")
    assert hash(Magnet(V1, V2, "a")) == hash(Magnet(V1, V2))
    assert Magnet(V1, V2) != Magnet(V1, None)


def test_other_spellings() -> None:
    base32 = base64.b32encode(V1).decode()
    assert Magnet.parse(f"  MAGNET:?xt=urn:btih:{base32.lower()}&tr=http%3A%2F%2Ft&ws=x\n") == Magnet(V1, None)
    assert Magnet.parse(f"magnet:?xt.1=urn:btih:{V1.hex().upper()}&xt.2=urn:btmh:1220{V2.hex()}") == Magnet(V1, V2)
    assert Magnet.parse(f"magnet:?dn=x&xt=urn:btmh:1220{V2.hex()}&xt=urn:ed2k:31D6").v1 is None


def test_unusable_peers_are_ignored_and_bounded() -> None:
    many = "".join(f"&x.pe=10.0.0.1:{port}" for port in range(1, 200))
    assert len(Magnet.parse(f"magnet:?xt=urn:btih:{V1.hex()}{many}").peers) == MAX_PEERS
    bad = "&x.pe=&x.pe=host&x.pe=host:0&x.pe=host:99999&x.pe=:1"
    assert Magnet.parse(f"magnet:?xt=urn:btih:{V1.hex()}{bad}").peers == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "magnet:",
        "magnet:?dn=x",
        "magnet:?xt=urn:btih:",
        "magnet:?xt=urn:btih:zz",
        f"magnet:?xt=urn:btih:{V1.hex()[:-1]}",
        f"magnet:?xt=urn:btih:{'g' * 40}",
        f"magnet:?xt=urn:btmh:{V2.hex()}",
        f"magnet:?xt=urn:btmh:1220{V2.hex()[:-2]}",
        f"magnet:?xt=urn:btih:{V1.hex()}&xt=urn:btih:{bytes(20).hex()}",
        f"magnet:?xt=urn:btih:{V1.hex()}&dn={'x' * 9000}",
        f"http://h/?xt=urn:btih:{V1.hex()}",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ArtifactError):
        Magnet.parse(text)


def test_a_magnet_without_hashes_cannot_be_made() -> None:
    for v1, v2 in ((None, None), (b"short", None), (None, b"short"), (b"", None)):
        with pytest.raises(ValueError, match="info-hash"):
            Magnet(v1, v2)
