"""What a device's precisions cost, as it was measured, and the file that remembers it. Imports no torch.

``devices.json`` in the data folder holds the latest measurements, each under a key: the libraries, the device, its
driver, the compute threads. Whatever is damaged or has another key is measured again (compute/measure.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torrentlm.errors import StorageError

FILE_NAME = "devices.json"
FORMAT = "torrentlm measurements 1"
MAX_FILE = 1 << 20
MAX_ENTRIES = 32
"""Measurements kept, the latest: each number of threads and each version of a library has its own."""
_MAX_TEXT = 1000

Key = Mapping[str, Any]
"""What a measurement holds for: JSON values."""


@dataclass(frozen=True, slots=True)
class PrecisionCost:
    """One precision on one device; ``lacking`` is a sentence that says why it cannot be used, the rest is 0 then.

    ``bytes_per_weight``: in memory, scales included. ``decode``: weights per second that one token's vector is
    multiplied by. ``prompt``: weights × tokens per second for a prompt's many tokens. ``error``: of a product with
    random weights, relative to that in F32 on the processor (root mean square).
    """

    precision: str
    bytes_per_weight: float = 0.0
    decode: float = 0.0
    prompt: float = 0.0
    error: float = 0.0
    lacking: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One device. Rates in bytes per second: ``read`` from its own memory, ``upload`` into it from the processor's
    pages, ``pinned`` from pages that the driver has locked (0: not possible).

    ``seconds`` is what measuring took. ``load``: how many processes wanted each core before it began (the average of a
    minute); from 1 on, the machine was busy and the rates are low.
    """

    device: str
    read: float
    upload: float
    pinned: float
    precisions: tuple[PrecisionCost, ...]
    seconds: float = 0.0
    load: float = 0.0

    def cost(self, precision: str) -> PrecisionCost:
        """That precision's; one that was not measured is lacking."""
        for cost in self.precisions:
            if cost.precision == precision:
                return cost
        return PrecisionCost(precision, lacking=f"{precision} has not been measured on {self.device}.")


def recall(folder: Path, key: Key) -> Measurement | None:
    """What was measured under this key; None if nothing was, or if the file is damaged or cannot be read."""
    for known, measurement in reversed(_entries(folder)):
        if known == dict(key):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return _measurement(measurement)
    return None


def remember(folder: Path, key: Key, measurement: Measurement) -> None:
    """Keep a measurement, atomically; StorageError with one sentence where the folder cannot be written to."""
    others = [entry for entry in _entries(folder) if entry[0] != dict(key)]
    entries = [*others, (dict(key), asdict(measurement))][-MAX_ENTRIES:]
    document = {"format": FORMAT, "entries": [{"key": known, "measurement": found} for known, found in entries]}
    path = folder / FILE_NAME
    part = folder / f"{FILE_NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"What the devices can do cannot be remembered in {path} ({(error.strerror or str(error)).lower()}), so it"
            " is measured at every start; make the folder writable, or choose another with --data."
        ) from error


def _entries(folder: Path) -> list[tuple[dict[str, Any], Any]]:
    try:
        with Path(folder, FILE_NAME).open("rb") as file:
            content = file.read(MAX_FILE + 1)
        document = json.loads(content) if len(content) <= MAX_FILE else None
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return []
    entries = document.get("entries")
    return [
        (entry["key"], entry.get("measurement"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("key"), dict)
    ]


def _measurement(value: dict[str, Any]) -> Measurement:
    """Raises ValueError, TypeError or KeyError for anything but what ``remember`` writes."""
    precisions = tuple(_cost(cost) for cost in value["precisions"])
    numbers = {name: _number(value[name]) for name in ("read", "upload", "pinned", "seconds", "load")}
    if not precisions or numbers["read"] == 0:
        raise ValueError("nothing was measured")
    return Measurement(device=_text(value["device"]), precisions=precisions, **numbers)


def _cost(value: dict[str, Any]) -> PrecisionCost:
    numbers = {name: _number(value[name]) for name in ("bytes_per_weight", "decode", "prompt", "error")}
    cost = PrecisionCost(precision=_text(value["precision"]), lacking=_text(value["lacking"]), **numbers)
    if not cost.lacking and not (cost.bytes_per_weight and cost.decode and cost.prompt):
        raise ValueError("a precision that is there costs something")
    return cost


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError
    return value
