"""Hypothesis strategies for everything that travels, made from the same declarations that the codec uses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from torrentlm.records import NodeKey, Span
from torrentlm.wire import frames
from torrentlm.wire.kinds import (
    Array,
    Bytes,
    Enumerated,
    Float,
    Int,
    Kind,
    OneOf,
    Optional,
    Struct,
    TensorKind,
    Text,
)
from torrentlm.wire.messages import SCHEMA, Message, Open
from torrentlm.wire.tensors import ITEM_SIZES, Tensor

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
streams = st.integers(0, frames.MAX_STREAMS - 1)
short_text = st.text(max_size=60)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    size = Tensor(dtype, shape, b"").nbytes
    repetitive = draw(st.booleans())  # so that some compress
    data = bytes([draw(st.integers(0, 255))]) * size if repetitive else draw(st.binary(min_size=size, max_size=size))
    return Tensor(dtype, shape, data)


def of_kind(kind: Kind) -> st.SearchStrategy[Any]:
    """Values that a field of this kind may hold."""
    match kind:
        case Int(low, high):
            return st.integers(low, high)
        case Float(low, high):
            return st.floats(low, high)
        case Bytes(size):
            return st.binary(min_size=size, max_size=size)
        case Text(limit):
            return st.text(max_size=limit // 4)
        case OneOf(choices):
            return st.sampled_from(choices)
        case Enumerated(members):
            return st.sampled_from(members)
        case Optional(inner):
            return st.none() | of_kind(inner)
        case Array(inner, limit):
            return st.lists(of_kind(inner), max_size=min(limit, 4)).map(tuple)
        case TensorKind():
            return tensors()
        case Struct(record=record) if record is Span:
            return st.tuples(u16, u16).map(lambda pair: Span(min(pair), max(pair)))
        case Struct(record=record, fields=fields):
            return st.builds(record, **{name: of_kind(inner) for name, inner in fields})
    raise AssertionError(f"no strategy for {kind!r}")


@st.composite
def _opens(draw: st.DrawFn) -> Open:
    values = {name: draw(of_kind(kind)) for name, kind in SCHEMA.structs[Open].fields}
    values["first"], values["last"] = sorted((values["first"], values["last"]))
    values["pads"] = (
        tuple(draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))) if (n := values["batch"]) < 9 else ()
    )
    return Open(**values)


def of_message(record: type) -> st.SearchStrategy[Message]:
    return _opens() if record is Open else of_kind(SCHEMA.structs[record])


messages = st.sampled_from(sorted(SCHEMA.structs, key=lambda record: record.__name__)).flatmap(of_message)

hellos = st.builds(
    frames.Hello,
    node=st.binary(min_size=32, max_size=32).map(NodeKey),
    nonce=st.binary(min_size=32, max_size=32),
    instance=st.binary(min_size=8, max_size=8),
    port=u16,
    software=short_text,
    version=st.integers(3, 255),
    oldest=st.integers(1, 3),
)
fixed_frames = st.one_of(
    st.builds(frames.Proof, u32, st.binary(min_size=64, max_size=64)),
    st.builds(frames.Select, u32, u32),
    st.builds(frames.Credit, u32, u32, streams, u32),
    st.builds(frames.Reset, u32, u32, streams),
    st.builds(frames.Ack, u32),
    st.builds(frames.Ping, st.binary(min_size=8, max_size=8)),
    st.builds(frames.Pong, st.binary(min_size=8, max_size=8)),
)
control_frames = hellos | fixed_frames | st.builds(frames.Bye, st.integers(0, 255), short_text)
