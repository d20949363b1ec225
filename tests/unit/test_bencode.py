from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm import bencode

VALUES = st.recursive(
    st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.binary(max_size=12), inner, max_size=5),
    max_leaves=25,
)


def decode(data: bytes, **options: bool) -> bencode.Value:
    return bencode.decode(data, max_size=1 << 16, **options)


@given(VALUES)
def test_round_trip(value: bencode.Value) -> None:
    assert decode(bencode.encode(value)) == value


@given(st.binary(max_size=60) | st.text("ilde0123456789-:ab", max_size=40).map(str.encode))
def test_whatever_is_accepted_is_canonical(data: bytes) -> None:
    try:
        value = decode(data)
    except ValueError:
        return
    assert bencode.encode(value) == data


@given(VALUES, st.data())
def test_every_truncation_and_trailing_byte_is_refused(value: bencode.Value, data: st.DataObject) -> None:
    encoded = bencode.encode(value)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError):
        decode(encoded[:cut])
    with pytest.raises(ValueError):
        decode(encoded + b"e")
    assert bencode.decode_prefix(encoded + b"rest", max_size=1 << 16) == (value, len(encoded))


@pytest.mark.parametrize(
    "data",
    [
        b"i-0e", b"i00e", b"i01e", b"ie", b"i-e", b"i+1e", b"i 1e", b"i1_0e", b"01:a", b"-1:a", b"1:", b"9" * 30 + b":",
        b"i" + b"9" * 21 + b"e", b"l", b"d", b"d1:ae", b"d1:a", b"di1e1:ae",
        b"d1:b1:x1:a1:ye", b"d1:a1:x1:a1:ye", b"x", b"",
    ],
)  # fmt: skip
def test_refuses(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_bounds() -> None:
    nested = b"l" * 32 + b"e" * 32
    assert bencode.encode(decode(nested)) == nested
    with pytest.raises(ValueError, match="nested"):
        decode(b"l" + nested + b"e")
    with pytest.raises(ValueError, match="nested"):
        decode(b"l" * 60_000)
    with pytest.raises(ValueError, match="more than the 3 allowed"):
        bencode.decode(b"2:aa", max_size=3)


def test_unsorted_keys_only_where_allowed() -> None:
    unsorted = b"d1:b1:x1:a1:ye"
    assert decode(unsorted, sorted_keys=False) == {b"b": b"x", b"a": b"y"}
    with pytest.raises(ValueError, match="twice"):
        decode(b"d1:b1:x1:a1:y1:b1:ze", sorted_keys=False)


def test_encode_takes_text_and_refuses_the_rest() -> None:
    assert bencode.encode({"z": "é", "a": (1, [b"x"])}) == b"d1:ali1el1:xee1:z2:\xc3\xa9e"
    for bad in (None, True, 1.5, {1: 2}, {"a": None}):
        with pytest.raises(TypeError):
            bencode.encode(bad)  # type: ignore[arg-type, dict-item]
