"""Magnet links (BEP 9, BEP 53's ``x.pe``) that name a model: what to fetch, and advice on where to begin."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote

from torrentlm.errors import ArtifactError
from torrentlm.records import Endpoint

MAX_LENGTH = 8192  # characters
MAX_PEERS = 64
MAX_NAME = 255  # characters
_SHA256 = "1220"  # multihash: function 0x12 (sha2-256), length 0x20
_BTIH = "urn:btih:"
_BTMH = "urn:btmh:"


@dataclass(frozen=True, slots=True)
class Magnet:
    """A magnet link. Its identity, and so its equality, is the info-hashes alone; ``name`` and ``peers`` are advice.

    ``v1``: BEP 3 info-hash, 20 bytes. ``v2``: BEP 52 info-hash, 32 bytes. At least one of them is there.
    """

    v1: bytes | None
    v2: bytes | None
    name: str = field(default="", compare=False)
    peers: tuple[Endpoint, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        lengths = (self.v1 is not None and len(self.v1), self.v2 is not None and len(self.v2))
        if lengths not in ((20, 32), (20, False), (False, 32)):
            raise ValueError("a magnet needs an info-hash: 20 bytes for v1, 32 for v2")

    def __str__(self) -> str:
        parts = []
        if self.v1 is not None:
            parts.append(f"xt={_BTIH}{self.v1.hex()}")
        if self.v2 is not None:
            parts.append(f"xt={_BTMH}{_SHA256}{self.v2.hex()}")
        if self.name:
            parts.append(f"dn={quote(self.name, safe='')}")
        parts += [f"x.pe={quote(str(peer), safe=':[]')}" for peer in self.peers]
        return "magnet:?" + "&".join(parts)

    @classmethod
    def parse(cls, text: str) -> Magnet:
        """Read a link; parameters that mean nothing here (``tr``, ``ws``, …) are ignored, so are unusable peers.

        Raises ArtifactError when it is no magnet link or names no torrent.
        """
        text = text.strip()
        if not is_magnet(text) or len(text) > MAX_LENGTH:
            raise ArtifactError(f"{_shown(text)} is not a magnet link; it should begin with magnet:?xt=urn:bt")
        v1: bytes | None = None
        v2: bytes | None = None
        name = ""
        peers: dict[Endpoint, None] = {}
        for key, value in parse_qsl(text[len("magnet:?") :], encoding="utf-8", errors="replace"):
            if key == "xt" or key.startswith("xt."):
                v1, v2 = _merge(v1, _read_btih(value), text), _merge(v2, _read_btmh(value), text)
            elif key == "dn":
                name = value[:MAX_NAME]
            elif key == "x.pe" and len(peers) < MAX_PEERS and (peer := _read_peer(value)):
                peers[peer] = None
        if v1 is None and v2 is None:
            raise ArtifactError(
                f"{_shown(text)} names no torrent; copy the whole link, with xt=urn:btih or xt=urn:btmh"
            )
        return cls(v1, v2, name, tuple(peers))


def is_magnet(text: str) -> bool:
    """Whether this is meant as a magnet link, well-formed or not."""
    return text.strip().lower().startswith("magnet:?")


def _merge(known: bytes | None, found: bytes | None, text: str) -> bytes | None:
    if known is not None and found is not None and known != found:
        raise ArtifactError(f"{_shown(text)} names two different torrents; use one of the two links")
    return known if found is None else found


def _read_btih(value: str) -> bytes | None:
    """40 hexadecimal or 32 base32 characters (BEP 9)."""
    if not value.lower().startswith(_BTIH):
        return None
    digest = value[len(_BTIH) :]
    try:
        found = base64.b32decode(digest.upper()) if len(digest) == 32 else binascii.unhexlify(digest)
    except ValueError:
        found = b""
    if len(found) != 20:
        raise ArtifactError(
            f"the magnet's v1 info-hash {_shown(digest)} is not 40 hexadecimal digits; copy the whole link"
        )
    return found


def _read_btmh(value: str) -> bytes | None:
    if not value.lower().startswith(_BTMH):
        return None
    digest = value[len(_BTMH) :]
    try:
        found = binascii.unhexlify(digest.removeprefix(_SHA256)) if digest.startswith(_SHA256) else b""
    except ValueError:
        found = b""
    if len(found) != 32:
        raise ArtifactError(
            f"the magnet's v2 info-hash {_shown(digest)} is not 1220 and 64 hexadecimal digits; copy the whole link"
        )
    return found


def _read_peer(value: str) -> Endpoint | None:
    try:
        return Endpoint.parse(value)
    except ValueError:
        return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
