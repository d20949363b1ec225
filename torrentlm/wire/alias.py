"""The wrong name by which one widespread client knows hybrid torrents.

aria2 before 1.37 (Debian 12 has 1.36) leaves empty names out when it writes a dictionary. In a v2 or hybrid torrent
every file is described under an empty name (BEP 52, "file tree"), so that its v1 info-hash for such a torrent is that
of a torrent that does not exist. It is as unique as the right one: whoever also answers to it can trade with those
clients.
"""

from __future__ import annotations

import hashlib

from torrentlm.bencode import Value, decode, encode
from torrentlm.records import InfoHash

_MAX_INFO = 32 << 20


def misnomer(info: bytes) -> InfoHash:
    """The info-hash that aria2 1.36 computes for this info dictionary; the right v1 one if there is no empty name in
    it.

    Raises ValueError if it is no bencoded dictionary.
    """
    pruned = encode(_without_empty_names(decode(info, max_size=_MAX_INFO)))
    return InfoHash(hashlib.sha1(pruned, usedforsecurity=False).digest())


def _without_empty_names(value: Value) -> Value:
    if isinstance(value, dict):
        return {name: _without_empty_names(item) for name, item in value.items() if name}
    if isinstance(value, list):
        return [_without_empty_names(item) for item in value]
    return value
