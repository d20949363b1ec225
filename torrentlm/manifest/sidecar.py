"""The sidecar of a model: how its split was proven, with which libraries, and a sample of what its blocks compute.

It is about a machine and a moment, so it lies beside the model torrent and is no part of the magnet. Nothing signs it:
from a peer it is advice.

::

    u32 header length, big-endian | header, a msgpack map | the sample's tensors one after the other, little-endian
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import msgpack

from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import DTYPE_BYTES, MAX_DIMENSIONS
from torrentlm.manifest.manifest import MAX_BLOCKS

VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
MAX_HEADER = 256 * 1024
"""Much less than all of it: small objects take far more memory than their encoding."""
MAX_OUTCOMES = 8
MAX_SIDES = 2
MAX_TENSORS = 64
"""Of one border."""
MAX_TOKENS = 64
MAX_TEXT = 128  # characters
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Libraries:
    """What a proof was made with. ``processor`` is the machine's kind, as torch sees it."""

    torch: str
    transformers: str
    torrentlm: str
    processor: str

    @property
    def decisive(self) -> tuple[str, str]:
        """The versions that decide what a model computes, whatever they were built for."""
        return self.torch.partition("+")[0], self.transformers

    def __str__(self) -> str:
        return f"torch {self.torch}, transformers {self.transformers}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the parts' outputs compared with the whole model's, both computed in ``dtype`` (safetensors' name).

    ``max_abs`` is the largest difference, ``max_rel`` the same as a share of the largest value, ``tolerance`` what that
    may be. Of ``tokens`` positions, ``agreeing`` had the same most likely token. ``from_f32`` is how far this dtype
    takes the whole model from F32, as a share of the largest value; None where F32 was not computed.
    """

    dtype: str
    max_abs: float
    max_rel: float
    tolerance: float
    tokens: int
    agreeing: int
    from_f32: float | None

    @property
    def exact(self) -> bool:
        """Equal to the bit."""
        return self.max_abs == 0.0 and self.agreeing == self.tokens

    @property
    def good(self) -> bool:
        return self.max_rel <= self.tolerance


@dataclass(frozen=True, slots=True)
class Recorded:
    """A tensor's values in C order, little-endian; ``dtype`` by safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Samples:
    """What went over the borders of one side for a text of ``tokens``, in F32, as it was or rounded to what ``borders``
    hold.

    ``borders[k]`` is what travels into layer call k, or behind the last one into the head; those of large models are
    not all there. ``output`` holds every ``stride``-th value of what the model makes of the last token. ``encoded`` is
    what a decoder was given of its encoder: hidden states [1, source, width], or nothing.
    """

    tokens: tuple[int, ...]
    borders: Mapping[int, tuple[Recorded, ...]]
    output: Recorded
    stride: int
    encoded: tuple[Recorded, ...] = ()

    @property
    def tensors(self) -> list[Recorded]:
        """All of them, in the order in which they are written."""
        borders = [tensor for _, border in sorted(self.borders.items()) for tensor in border]
        return [*borders, self.output, *self.encoded]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """``model`` is the model torrent's v2 info-hash. ``parts``: into how many it was cut for the proof, ``text``:
    whether real text was among the inputs, ``streamed``: whether the weights were never there all at once. ``samples``:
    of each side, as far as there are any.
    """

    model: bytes
    made_with: Libraries
    parts: int
    text: bool
    streamed: bool
    outcomes: tuple[Outcome, ...]
    samples: tuple[Samples, ...] = ()

    def described(self) -> dict[str, Any]:
        """What ``inspect --json`` says of it."""
        outcomes = [asdict(outcome) | {"exact": outcome.exact, "good": outcome.good} for outcome in self.outcomes]
        return {
            **asdict(self.made_with),
            "parts": self.parts,
            "text": self.text,
            "streamed": self.streamed,
            "sampled_borders": sum(len(samples.borders) for samples in self.samples),
            "outcomes": outcomes,
        }

    def to_bytes(self) -> bytes:
        """Raises ValueError if that is more than MAX_BYTES, or its header more than MAX_HEADER."""
        content = {
            "version": VERSION,
            "model": self.model,
            "made_with": asdict(self.made_with),
            "parts": self.parts,
            "text": self.text,
            "streamed": self.streamed,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "samples": [
                {
                    "tokens": list(samples.tokens),
                    "borders": [[at, list(map(_shape, border))] for at, border in sorted(samples.borders.items())],
                    "output": _shape(samples.output),
                    "stride": samples.stride,
                    "encoded": list(map(_shape, samples.encoded)),
                }
                for samples in self.samples
            ],
        }
        header = msgpack.packb(content)
        tensors = (tensor.data for samples in self.samples for tensor in samples.tensors)
        data = b"".join((len(header).to_bytes(4), header, *tensors))
        if len(header) > MAX_HEADER or len(data) > MAX_BYTES:
            raise ValueError(f"a sidecar of {len(data)} bytes is too large")
        return data

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, model: bytes) -> Sidecar:
        """Read and check the sidecar of the model with this v2 info-hash. Raises ArtifactError for anything else."""
        try:
            return _read(data, model)
        except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
            raise ArtifactError(f"this is no usable sidecar of the model ({error})") from error


def _shape(recorded: Recorded) -> list[Any]:
    return [recorded.dtype, list(recorded.shape)]


def _read(data: bytes | memoryview, model: bytes) -> Sidecar:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes")
    begin = 4 + int.from_bytes(data[:4])
    if begin > min(len(data), 4 + MAX_HEADER):
        raise ValueError("its header is too long")
    content = msgpack.unpackb(data[4:begin], max_str_len=4 * MAX_TEXT, max_array_len=MAX_BLOCKS + 1, max_map_len=16)
    found = _map(content, {"version", *(field.name for field in fields(Sidecar))})
    if found["version"] != VERSION:
        raise ValueError(f"it is of version {found['version']!r:.20}, this torrentlm reads version {VERSION}")
    if _typed(found["model"], bytes) != model:
        raise ValueError("it is another model's")
    made_with = _map(found["made_with"], {field.name for field in fields(Libraries)})
    outcomes = tuple(map(_outcome, _typed(found["outcomes"], list)))
    if not 1 <= len(outcomes) <= MAX_OUTCOMES:
        raise ValueError("it has no outcomes, or too many")
    rest = _Data(data, begin)
    samples = tuple(_samples(item, rest) for item in _list(found["samples"], MAX_SIDES))
    if not rest.ends:
        raise ValueError("something follows it")
    return Sidecar(
        model,
        Libraries(**{name: _text(value) for name, value in made_with.items()}),
        _number(found["parts"], MAX_BLOCKS),
        _typed(found["text"], bool),
        _typed(found["streamed"], bool),
        outcomes,
        samples,
    )


def _outcome(item: object) -> Outcome:
    found = _map(item, {field.name for field in fields(Outcome)})
    floats = {name: _typed(found[name], float) for name in ("max_abs", "max_rel", "tolerance")}
    from_f32 = None if found["from_f32"] is None else _typed(found["from_f32"], float)
    if any(math.isnan(value) or value < 0 for value in (*floats.values(), from_f32 or 0.0)):
        raise ValueError("a difference is not a number")
    tokens = _number(found["tokens"], 1 << 31)
    agreeing = _number(found["agreeing"], tokens)
    return Outcome(dtype=_dtype(found["dtype"]), tokens=tokens, agreeing=agreeing, from_f32=from_f32, **floats)


def _samples(item: object, data: _Data) -> Samples:
    found = _map(item, {field.name for field in fields(Samples)})
    tokens = tuple(_number(token, (1 << 31) - 1) for token in _list(found["tokens"], MAX_TOKENS))
    borders: dict[int, tuple[Recorded, ...]] = {}
    for entry in _list(found["borders"], MAX_BLOCKS + 1):
        at, tensors = _pair(entry)
        borders[_number(at, MAX_BLOCKS)] = tuple(map(data.take, _list(tensors, MAX_TENSORS)))
    output = data.take(found["output"])
    stride = _number(found["stride"], 1 << 31)
    encoded = tuple(map(data.take, _list(found["encoded"], 1)))
    if not tokens or stride < 1:
        raise ValueError("its sample is of nothing")
    return Samples(tokens, borders, output, stride, encoded)


class _Data:
    """The bytes behind the header, taken off tensor by tensor."""

    def __init__(self, data: bytes | memoryview, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, item: object) -> Recorded:
        dtype, sizes = _pair(item)
        shape = tuple(_number(size, MAX_BYTES) for size in _list(sizes, MAX_DIMENSIONS))
        end = self._at + math.prod(shape) * DTYPE_BYTES[_dtype(dtype)]
        if end > len(self._data):
            raise ValueError("its sample is cut short")
        begin, self._at = self._at, end
        return Recorded(dtype, shape, bytes(self._data[begin:end]))

    @property
    def ends(self) -> bool:
        return self._at == len(self._data)


def _map(item: object, keys: Iterable[str]) -> dict[str, Any]:
    if not isinstance(item, dict) or item.keys() != set(keys):
        raise ValueError("a map does not have its keys")
    return item


def _typed(value: object, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise TypeError(f"a value is no {kind.__name__}")
    return value


def _list(value: object, most: int) -> list[Any]:
    found: list[Any] = _typed(value, list)
    if len(found) > most:
        raise ValueError("a list is too long")
    return found


def _pair(value: object) -> list[Any]:
    found = _list(value, 2)
    if len(found) != 2:
        raise ValueError("a pair is none")
    return found


def _number(value: object, most: int) -> int:
    found = _typed(value, int)
    if not 0 <= found <= most:
        raise ValueError("a number is out of range")
    return found


def _text(value: object) -> str:
    found = _typed(value, str)
    if not 1 <= len(found) <= MAX_TEXT or not found.isprintable():
        raise ValueError("a text is empty, too long or not printable")
    return found


def _dtype(value: object) -> str:
    found = _typed(value, str)
    if found not in DTYPE_BYTES:
        raise ValueError("a dtype is unknown")
    return found
