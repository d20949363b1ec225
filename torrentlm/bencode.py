"""Bencoding (BEP 3): canonical when written, strict and bounded when read. Standard library only.

Values are ``int``, ``bytes``, ``list`` and ``dict`` with ``bytes`` keys. ``encode`` also takes ``str`` (as UTF-8),
tuples and ``str`` keys, so that torrents can be written down legibly. What ``decode`` accepts with
``sorted_keys=True`` is canonical: encoding it again gives the same bytes, so an info-hash can be computed from a
parsed torrent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "int | bytes | list[Value] | dict[bytes, Value]"
Encodable: TypeAlias = "int | bytes | str | Sequence[Encodable] | Mapping[bytes, Encodable] | Mapping[str, Encodable]"

MAX_DEPTH = 32
MAX_DIGITS = 20  # enough for any 64-bit integer with its sign; turning more digits into an int costs quadratic time


def encode(value: Encodable) -> bytes:
    """The one canonical form: dictionary keys in raw byte order. Raises TypeError for what bencoding cannot express."""
    out: list[bytes] = []
    _append(value, out)
    return b"".join(out)


def _append(value: object, out: list[bytes]) -> None:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        out += (b"%d:" % len(value), value)
    elif isinstance(value, int) and not isinstance(value, bool):
        out.append(b"i%de" % value)
    elif isinstance(value, list | tuple):
        out.append(b"l")
        for item in value:
            _append(item, out)
        out.append(b"e")
    elif isinstance(value, Mapping):
        items = {key.encode() if isinstance(key, str) else key: item for key, item in value.items()}
        out.append(b"d")
        for key in sorted(items):
            if not isinstance(key, bytes):
                raise TypeError("the keys of a bencoded dictionary are bytes")
            _append(key, out)
            _append(items[key], out)
        out.append(b"e")
    else:
        raise TypeError(f"{type(value).__name__} cannot be bencoded")


def decode(data: bytes, *, max_size: int, max_depth: int = MAX_DEPTH, sorted_keys: bool = True) -> Value:
    """Read one value that fills ``data`` exactly; raise ValueError with the reason otherwise.

    ``max_size`` bytes bound the input before anything is parsed. With ``sorted_keys=False`` dictionary keys may come in
    any order, as some clients write them in their extended handshake; a key given twice is refused either way.
    """
    value, end = decode_prefix(data, max_size=max_size, max_depth=max_depth, sorted_keys=sorted_keys)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the bencoded value")
    return value


def decode_prefix(
    data: bytes, *, max_size: int, max_depth: int = MAX_DEPTH, sorted_keys: bool = True
) -> tuple[Value, int]:
    """Like ``decode``, for messages that go on after the value (BEP 9): the value and where it ends in ``data``."""
    if len(data) > max_size:
        raise ValueError(f"{len(data)} bytes of bencoded data are more than the {max_size} allowed")
    return _Decoder(data, sorted_keys).value(0, max_depth)


class _Decoder:
    """Recursive descent over one buffer; every method takes the position to read at and returns the one after."""

    def __init__(self, data: bytes, sorted_keys: bool) -> None:
        self._data = data
        self._sorted_keys = sorted_keys

    def value(self, at: int, depth: int) -> tuple[Value, int]:
        lead = self._data[at : at + 1]
        if lead.isdigit():
            return self._string(at)
        if lead == b"i":
            return self._number(at + 1, b"e")
        if lead not in (b"l", b"d"):
            raise ValueError(f"no bencoded value starts at byte {at}")
        if depth == 0:
            raise ValueError("bencoded data are nested too deeply")
        return self._list(at + 1, depth - 1) if lead == b"l" else self._dict(at + 1, depth - 1)

    def _number(self, at: int, terminator: bytes) -> tuple[int, int]:
        end = self._data.find(terminator, at, at + MAX_DIGITS + 1)
        digits = self._data[at:end] if end >= 0 else b""
        unsigned = digits.removeprefix(b"-")
        if not unsigned.isdigit() or (unsigned[0] == ord("0") and digits != b"0"):
            raise ValueError(f"no canonical number of at most {MAX_DIGITS} digits at byte {at}")
        return int(digits), end + 1

    def _string(self, at: int) -> tuple[bytes, int]:
        length, start = self._number(at, b":")
        end = start + length
        if end > len(self._data):
            raise ValueError(f"the string at byte {at} ends after the data")
        return self._data[start:end], end

    def _list(self, at: int, depth: int) -> tuple[list[Value], int]:
        items: list[Value] = []
        while self._data[at : at + 1] != b"e":
            item, at = self.value(at, depth)
            items.append(item)
        return items, at + 1

    def _dict(self, at: int, depth: int) -> tuple[dict[bytes, Value], int]:
        items: dict[bytes, Value] = {}
        last: bytes | None = None
        while self._data[at : at + 1] != b"e":
            if not self._data[at : at + 1].isdigit():
                raise ValueError(f"no dictionary key at byte {at}")
            key, at = self._string(at)
            if key in items:
                raise ValueError("a dictionary key is given twice")
            if self._sorted_keys and last is not None and key < last:
                raise ValueError("dictionary keys are not sorted")
            items[key], at = self.value(at, depth)
            last = key
        return items, at + 1
