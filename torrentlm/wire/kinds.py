"""Kinds: what a field of a message may hold, said where the field is declared (``Annotated[int, Int(0, 255)]``).

A kind checks and converts in both directions. It raises ValueError on a value out of bounds, which the codec turns into
LocalProtocolError when we encode and into RemoteProtocolError when we decode.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, get_args, get_type_hints

from torrentlm.wire.tensors import PayloadReader, PayloadWriter, Tensor


class Kind:
    """What a field may hold. ``pack`` gives what msgpack stores, ``unpack`` undoes it; both raise ValueError out of
    bounds."""

    def pack(self, value: Any, payload: PayloadWriter) -> Any:
        return self.check(value)

    def unpack(self, raw: Any, payload: PayloadReader) -> Any:
        return self.check(raw)

    def check(self, value: Any) -> Any:
        """For kinds whose two forms are the same."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The kind as docs/protocol.md writes it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Int(Kind):
    low: int
    high: int

    def check(self, value: Any) -> int:
        if type(value) is int and self.low <= value <= self.high:
            return value
        raise ValueError(f"is {_short(value)}, not an integer from {self.low} to {self.high}")

    def __str__(self) -> str:
        high = f"2^{self.high.bit_length()}-1" if self.high > 10**9 and not self.high & (self.high + 1) else self.high
        return f"int {self.low}..{high}"


@dataclass(frozen=True)
class Enumerated(Kind):
    members: type[IntEnum]

    def pack(self, value: Any, payload: PayloadWriter) -> int:
        return int(self.members(value))

    def check(self, value: Any) -> IntEnum:
        if type(value) is not int:
            raise ValueError(f"is {_short(value)}, not an integer")
        return self.members(value)

    def __str__(self) -> str:
        return ", ".join(f"{member.value} {member.name}" for member in self.members)


@dataclass(frozen=True)
class Float(Kind):
    low: float
    high: float

    def check(self, value: Any) -> float:
        if type(value) in (float, int) and self.low <= value <= self.high:
            return float(value)
        raise ValueError(f"is {_short(value)}, not a number from {self.low} to {self.high}")

    def __str__(self) -> str:
        return f"float {self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Bytes(Kind):
    size: int

    def check(self, value: Any) -> bytes:
        if type(value) is bytes and len(value) == self.size:
            return value
        raise ValueError(f"is {_short(value)}, not {self.size} bytes")

    def __str__(self) -> str:
        return f"bin {self.size}"


@dataclass(frozen=True)
class Text(Kind):
    """At most ``limit`` bytes of UTF-8."""

    limit: int

    def check(self, value: Any) -> str:
        if type(value) is str and len(value) <= self.limit and len(value.encode()) <= self.limit:
            return value
        raise ValueError(f"is {_short(value)}, not a text of at most {self.limit} bytes")

    def __str__(self) -> str:
        return f"str ≤{self.limit}"


@dataclass(frozen=True)
class OneOf(Kind):
    choices: tuple[str, ...]

    def check(self, value: Any) -> str:
        if type(value) is str and value in self.choices:
            return value
        raise ValueError(f"is {_short(value)}, not one of {', '.join(self.choices)}")

    def __str__(self) -> str:
        return " | ".join(f'"{choice}"' for choice in self.choices)


@dataclass(frozen=True)
class Optional(Kind):
    inner: Kind

    def pack(self, value: Any, payload: PayloadWriter) -> Any:
        return None if value is None else self.inner.pack(value, payload)

    def unpack(self, raw: Any, payload: PayloadReader) -> Any:
        return None if raw is None else self.inner.unpack(raw, payload)

    def __str__(self) -> str:
        return f"{self.inner} or nil"


@dataclass(frozen=True)
class Array(Kind):
    inner: Kind
    limit: int

    def pack(self, value: Any, payload: PayloadWriter) -> list[Any]:
        return [self.inner.pack(item, payload) for item in self._bounded(value)]

    def unpack(self, raw: Any, payload: PayloadReader) -> tuple[Any, ...]:
        return tuple([self.inner.unpack(item, payload) for item in self._bounded(raw)])

    def _bounded(self, items: Any) -> tuple[Any, ...]:
        if type(items) is tuple and len(items) <= self.limit:
            return items
        raise ValueError(f"is {_short(items)}, not a row of at most {self.limit}")

    def __str__(self) -> str:
        return f"array ≤{self.limit} of ({self.inner})"


class TensorKind(Kind):
    def pack(self, value: Any, payload: PayloadWriter) -> list[int]:
        if type(value) is not Tensor:
            raise ValueError(f"is {_short(value)}, not a Tensor")
        return payload.add(value)

    def unpack(self, raw: Any, payload: PayloadReader) -> Tensor:
        return payload.take(raw)

    def __str__(self) -> str:
        return "tensor"


class Struct(Kind):
    """A dataclass as the array of its fields. The kinds of those not annotated with one come in ``kinds``."""

    def __init__(self, record: type, **kinds: Kind) -> None:
        self.record = record
        self.fields = _fields_of(record, kinds)

    def pack(self, value: Any, payload: PayloadWriter) -> list[Any]:
        if type(value) is not self.record:
            raise ValueError(f"is {_short(value)}, not a {self.record.__name__}")
        return pack_fields(self.fields, value, payload)

    def unpack(self, raw: Any, payload: PayloadReader) -> Any:
        return self.record(*unpack_fields(self.fields, raw, payload))

    def __str__(self) -> str:
        return self.record.__name__


Fields = tuple[tuple[str, Kind], ...]


def _fields_of(record: type, kinds: dict[str, Kind]) -> Fields:
    hints = get_type_hints(record, include_extras=True)
    return tuple(
        (field.name, kinds.get(field.name) or _kind_of(hints[field.name])) for field in dataclasses.fields(record)
    )


def _kind_of(hint: Any) -> Kind:
    return next(item for item in get_args(hint) if isinstance(item, Kind))


def pack_fields(fields: Fields, record: Any, payload: PayloadWriter) -> list[Any]:
    packed: list[Any] = []
    try:
        for name, kind in fields:
            packed.append(kind.pack(getattr(record, name), payload))
    except ValueError as error:
        raise ValueError(f"{fields[len(packed)][0]} {error}") from error
    return packed


def unpack_fields(fields: Fields, raw: Any, payload: PayloadReader) -> list[Any]:
    if type(raw) is not tuple or len(raw) != len(fields):
        raise ValueError(f"is {_short(raw)}, not a row of {len(fields)} fields")
    values: list[Any] = []
    try:
        for (_, kind), item in zip(fields, raw, strict=True):
            values.append(kind.unpack(item, payload))
    except ValueError as error:
        raise ValueError(f"{fields[len(values)][0]} {error}") from error
    return values


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str | bytes | None) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
