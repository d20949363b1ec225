from __future__ import annotations

import hashlib

import pytest

from torrentlm.bencode import encode
from torrentlm.wire.alias import misnomer


def test_empty_names_are_left_out() -> None:
    info = {"file tree": {"a": {"": {"length": 1}}}, "name": "a", "list": [{"": 1, "b": 2}]}
    said = {"file tree": {"a": {}}, "name": "a", "list": [{"b": 2}]}
    assert misnomer(encode(info)) == hashlib.sha1(encode(said)).digest()


def test_a_v1_torrent_has_its_right_name() -> None:
    info = encode({"length": 1, "name": "a", "piece length": 16384, "pieces": b"x" * 20})
    assert misnomer(info) == hashlib.sha1(info).digest()


def test_what_is_no_info_dictionary() -> None:
    with pytest.raises(ValueError, match="byte 0"):
        misnomer(b"junk")
