"""The extended handshake (BEP 10) as it passes the gateway: our extension added, what must not pass taken out.

Everything that is not named here is kept as it was, only its order becomes canonical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torrentlm.bencode import Value, decode_prefix, encode
from torrentlm.errors import LocalProtocolError, RemoteProtocolError

PIPE_NAME: Final = b"torrentlm_pipe"

PIPE_ID: Final = 77
"""The extension id by which others send frames to us; the id for frames to a peer is in the peer's handshake."""

MAX_HANDSHAKE: Final = 1 << 15

_REMOVED: Final = (PIPE_NAME, b"ut_pex", b"ut_holepunch")
"""Not offered on behalf of the client: peer exchange would spread ports at which nobody listens, hole punching is for
uTP."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A peer's extended handshake: ``payload`` as it goes on to the client, and the id for frames to it (None: no
    pipe)."""

    payload: bytes
    pipe_id: int | None


def read_offer(payload: bytes) -> Offer:
    """A peer's extended handshake, without what is not for the client. RemoteProtocolError if it is none."""
    fields, rest = _decode(payload)
    names = _names(fields)
    pipe_id = names.get(PIPE_NAME)
    if pipe_id is not None and not (isinstance(pipe_id, int) and 0 <= pipe_id < 256):
        raise RemoteProtocolError("the peer's extended handshake gives the pipe an id that is no byte")
    if names.keys() & set(_REMOVED):
        fields[b"m"] = {name: number for name, number in names.items() if name not in _REMOVED}
        payload = encode(fields) + rest
    return Offer(payload, pipe_id or None)


def make_offer(payload: bytes, port: int) -> bytes:
    """The client's extended handshake with the pipe and the port at which this node really listens."""
    fields, rest = _decode(payload)
    names = _names(fields)
    if PIPE_ID in names.values():
        raise LocalProtocolError(f"the client uses extension id {PIPE_ID} for something else")
    kept = {name: number for name, number in names.items() if name not in _REMOVED}
    return encode({**fields, b"m": {**kept, PIPE_NAME: PIPE_ID}, b"p": port}) + rest


def bare_offer(port: int) -> bytes:
    """The extended handshake on a connection that carries nothing but a pipe."""
    return encode({"m": {PIPE_NAME: PIPE_ID}, "p": port, "v": "TorrentLM"})


def _decode(payload: bytes) -> tuple[dict[bytes, Value], bytes]:
    try:
        fields, end = decode_prefix(payload, max_size=MAX_HANDSHAKE, sorted_keys=False)
    except ValueError as error:
        raise RemoteProtocolError(f"an extended handshake cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise RemoteProtocolError("an extended handshake is no dictionary")
    return fields, payload[end:]


def _names(fields: dict[bytes, Value]) -> dict[bytes, Value]:
    names = fields.get(b"m", {})
    if not isinstance(names, dict):
        raise RemoteProtocolError("an extended handshake has no dictionary of names")
    return names
