"""Kinds of values in a model.toml: what a sentence calls one, and how it is read.

``read`` takes what TOML gives and raises ValueError on anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torrentlm.config.settings import DTYPES, FLOORS, PRECISIONS, TASKS, Blocks
from torrentlm.records import Endpoint, Span

MIN_LIMIT = 1000
"""Bytes per second; less would move a piece in hours, and 0 is what somebody writes who wants none at all."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value: what a sentence calls it, how to read it, and how its text form becomes the TOML form."""

    wants: str
    read: Callable[[Any, Path], Any]
    from_text: Callable[[str], object] = str
    choices: tuple[str, ...] = ()


def _text(value: object, base: Path) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value.strip()


def _path(value: object, base: Path) -> Path:
    if isinstance(value, Path):
        return base / value
    return base / Path(_text(value, base)).expanduser()


def _number(low: int, high: int) -> Callable[[object, Path], int]:
    def read(value: object, base: Path) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return read


def _seconds(value: object, base: Path) -> float:
    if type(value) not in (int, float) or not 1 <= float(str(value)) <= 86400:
        raise ValueError
    return float(str(value))


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Bytes meant by ``4000000``, ``"4GB"`` (decimal) or ``"512 MiB"`` (binary); ValueError for anything else."""
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"{value!r} is no size")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return parse_size(int(float(number) * (1024 if binary else 1000) ** power))


def _budget(value: object, base: Path) -> int | None:
    return None if value == "auto" else parse_size(value)


def _bound(value: object, base: Path) -> int:
    return 0 if value == "off" else parse_size(value)


def _share(value: object, base: Path) -> int | None:
    return 0 if value == "off" else _budget(value, base)


def _rate(value: object, base: Path) -> int | None:
    rate = _budget(value, base)
    if rate == 0:
        raise ValueError('to fetch nothing ahead, say prefetch = "off"')
    return rate


def _limit(value: object, base: Path) -> int:
    limit = _bound(value, base)
    if value != "off" and limit < MIN_LIMIT:
        raise ValueError
    return limit


def _threads(value: object, base: Path) -> int | None:
    return None if value == "auto" else _number(1, 1024)(value, base)


def _choice(choices: tuple[str, ...]) -> Callable[[object, Path], str]:
    def read(value: object, base: Path) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return read


def _hashes(value: object, base: Path) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError
    hashes = tuple(item.strip().lower() for item in value)
    if not all(re.fullmatch("[0-9a-f]{64}", item) for item in hashes):
        raise ValueError
    return hashes


def _flag(value: object, base: Path) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _flag_word(text: str) -> object:
    return {"true": True, "false": False}.get(text.lower(), text)


def _texts(value: object, base: Path) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError  # noqa: TRY004  # as all of these do
    return tuple(_text(item, base) for item in value)


def _endpoints(value: object, base: Path) -> tuple[Endpoint, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | Endpoint) for item in value):
        raise ValueError
    return tuple(item if isinstance(item, Endpoint) else Endpoint.parse(item) for item in value)


def _bootstrap(value: object, base: Path) -> tuple[Endpoint, ...] | None:
    words = [value] if isinstance(value, str) else value
    if words == ["public"] or words == ("public",):
        return None
    return () if words == ["none"] or words == ("none",) else _endpoints(value, base)


def _blocks(value: object, base: Path) -> Blocks:
    if isinstance(value, Span) or value == "auto" or value == "none":
        return value
    return _span(value)


def _span(value: object) -> Span:
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", value) if isinstance(value, str) else None
    if not match:
        raise ValueError
    return Span(int(match[1]), int(match[2] or match[1]))


def _devices(value: object, base: Path) -> tuple[str, ...] | None:
    words = _words(value) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError
    names = tuple(dict.fromkeys(word.strip().lower() for word in words))
    if names == ("auto",):
        return None
    if not all(re.fullmatch(r"mps|(cpu|cuda)(:\d{1,3})?", name) for name in names):
        raise ValueError
    return tuple(f"{name}:0" if name == "cuda" else name for name in names)


def _precision_of(value: object, base: Path) -> tuple[tuple[Span, str], ...]:
    if isinstance(value, str):
        value = _pairs(value)
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # as all of these do
    read = sorted((_span(blocks), _choice(FLOORS)(precision, base)) for blocks, precision in value.items())
    if any(before.last >= after.first for (before, _), (after, _) in pairwise(read)):
        raise ValueError("two of its ranges overlap")
    return tuple(read)


def _pairs(text: str) -> object:
    """``0-3=INT8, 5=INT4`` as the table that it stands for."""
    words = [word.partition("=") for word in _words(text)]
    return {blocks.strip(): precision.strip() for blocks, _, precision in words}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _bootstrap_words(text: str) -> object:
    return text if text in ("public", "none") else _words(text)


def _integer(text: str) -> object:
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def _decimal(text: str) -> object:
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) else text


TEXT = Kind("a short text", _text)
PATH = Kind("a path", _path)
BUDGET = Kind('a size such as "4GB" or "512 MiB", a number of bytes, or "auto"', _budget, _integer)
BOUND = Kind('a size such as "200MB", a number of bytes, or "off"', _bound, _integer, ("off",))
SHARE = Kind('a size such as "4GB" or "512 MiB", a number of bytes, "auto" or "off"', _share, _integer, ("auto", "off"))
RATE = Kind('a size per second such as "1MB", a number of bytes, or "auto"', _rate, _integer, ("auto",))
LIMIT = Kind('a size per second from "1kB" up, such as "2MB", or "off"', _limit, _integer, ("off",))
PORT = Kind("a whole number from 0 (any free port) to 65535", _number(0, 65535), _integer)
COUNT = Kind("a whole number from 1 to 1024", _number(1, 1024), _integer)
THREADS = Kind('a whole number from 1 to 1024, or "auto"', _threads, _integer, ("auto",))
SECONDS = Kind("a number of seconds from 1 to 86400", _seconds, _decimal)
ENDPOINTS = Kind('a list of "HOST:PORT"', _endpoints, _words)
BOOTSTRAP = Kind('a list of "HOST:PORT", "public" or "none"', _bootstrap, _bootstrap_words, ("public", "none"))
HASHES = Kind("a list of SHA-256 hashes, 64 hexadecimal digits each", _hashes, _words)
BLOCKS = Kind('"auto", "none" or a range such as "0-10"', _blocks, str, ("auto", "none"))
DEVICES = Kind('"auto", or a list of devices such as "cpu" and "cuda:0"', _devices, str, ("auto", "cpu", "cuda", "mps"))
PRECISION = Kind("one of " + ", ".join(map(repr, PRECISIONS)), _choice(PRECISIONS), str, PRECISIONS)
PRECISION_OF = Kind('a table of blocks and precisions such as { "1-4" = "INT8", "5" = "BF16" }', _precision_of, _pairs)
FLOOR = Kind("one of " + ", ".join(map(repr, FLOORS)), _choice(FLOORS), str, FLOORS)
FLAG = Kind("true or false", _flag, _flag_word)
SEED = Kind("a whole number from 0 up", _number(0, 2**63 - 1), _integer)
TEXTS = Kind("a list of texts", _texts, _words)
TASK = Kind("one of " + ", ".join(map(repr, TASKS)), _choice(TASKS), str, TASKS)
DTYPE = Kind("one of " + ", ".join(map(repr, DTYPES)), _choice(DTYPES), str, DTYPES)
