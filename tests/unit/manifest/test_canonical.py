from __future__ import annotations

import io
import json
import struct

import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec

SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(canonical.DTYPE_BYTES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def content(spec: TensorSpec) -> bytes:
    return bytes((i * 7 + len(spec.name)) % 256 for i in range(spec.nbytes))


def written(specs: list[TensorSpec]) -> bytes:
    sink = io.BytesIO()
    by_name = {spec.name: spec for spec in specs}

    def read(name: str) -> list[bytes]:
        data = content(by_name[name])
        return [data[:3], data[3:]]

    canonical.write(canonical.layout(specs), read, sink.write)
    return sink.getvalue()


def read(data: bytes) -> canonical.Layout:
    return canonical.read_layout(io.BytesIO(data), len(data), "x.safetensors")


@given(SPECS, st.randoms())
def test_round_trip_whatever_the_order_given(specs: list[TensorSpec], random: object) -> None:
    data = written(specs)
    random.shuffle(specs)  # type: ignore[attr-defined]
    assert written(specs) == data
    layout = canonical.read_canonical(io.BytesIO(data), len(data), "x")
    assert layout == canonical.layout(specs)
    assert layout.size == len(data)
    assert {placed.tensor for placed in layout.tensors} == set(specs)
    for placed in layout.tensors:
        assert data[placed.start : placed.end] == content(placed.tensor)
        assert placed.start % canonical.DTYPE_BYTES[placed.tensor.dtype] == 0
        if placed.tensor.nbytes % canonical.ALIGNMENT == 0:
            assert placed.start % canonical.ALIGNMENT == 0


def test_other_readers_see_the_same_tensors() -> None:
    specs = [
        TensorSpec("b", "F32", (2, 3)),
        TensorSpec("a", "F16", (5,)),
        TensorSpec("c", "I64", ()),
        TensorSpec("é", "U8", (3,)),
    ]
    data = written(specs)
    seen = safetensors.numpy.load(data)
    assert {name: (array.shape, array.tobytes()) for name, array in seen.items()} == {
        spec.name: (spec.shape, content(spec)) for spec in specs
    }
    theirs = safetensors.numpy.save(seen)  # the reference implementation lays these out alike, but for the padding
    assert unpadded(theirs) == unpadded(data)


def unpadded(data: bytes) -> tuple[bytes, bytes]:
    """The header as JSON alone, and the tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end].rstrip(b" "), data[end:]


def test_large_tensors_begin_where_torch_can_compute_with_them() -> None:
    specs = [TensorSpec("a", "F32", ()), TensorSpec("b", "BF16", (8, 4)), TensorSpec("c", "F32", (16, 3))]
    layout = canonical.layout(specs)
    assert [placed.tensor.name for placed in layout.tensors] == ["c", "b", "a"]
    assert [placed.start % canonical.ALIGNMENT for placed in layout.tensors] == [0, 0, 0]


def test_foreign_order_and_metadata_are_read_but_not_canonical() -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry("F32", [1], 2, 6), "b": entry("U8", [2], 0, 2)}
    data = encoded(header, 6)
    assert [placed.tensor.name for placed in read(data).tensors] == ["b", "a"]
    assert read(data).tensors[0].start == len(data) - 6
    with pytest.raises(ArtifactError, match="canonical"):
        canonical.read_canonical(io.BytesIO(data), len(data), "x")


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def encoded(header: object, size: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry("F32", [1], 0, 4)}, 3),
        ({"a": entry("F32", [1], 0, 4)}, 5),
        ({"a": entry("F32", [2], 0, 4)}, 4),
        ({"a": entry("F32", [1], 4, 8)}, 8),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6),
        ({"a": entry("Q9", [1], 0, 4)}, 4),
        ({"a": entry("F32", [-1], 0, -4)}, 0),
        ({"a": entry("F32", [1.0], 0, 4)}, 4),
        ({"a": entry("F32", [True], 0, 4)}, 4),
        ({"a": entry("F32", [10**30], 0, 4)}, 4),
        ({"a": entry("F32", [1] * 17, 0, 4)}, 4),
        ({"a": entry(["F32"], [1], 0, 4)}, 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
        ({"a": None}, 0),
        ([], 0),
        (
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            0,
        ),
        (b"{" * 9, 0),
        (b"[" * 200_000, 0),
        (b"\xff", 0),
    ],
)
def test_refuses_malformed(header: object, size: int) -> None:
    with pytest.raises(ArtifactError, match=r"x\.safetensors is not a usable"):
        read(encoded(header, size))


@given(SPECS, st.data())
def test_refuses_every_truncation(specs: list[TensorSpec], data: st.DataObject) -> None:
    whole = written(specs)
    with pytest.raises(ArtifactError):
        read(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=80))
def test_arbitrary_bytes_never_raise_anything_else(data: bytes) -> None:
    try:
        layout = read(data)
    except ArtifactError:
        return
    assert layout.size == len(data)


def test_header_length_is_bounded_before_reading() -> None:
    with pytest.raises(ArtifactError, match="too long"):
        read(b"\xff" * 8 + b"{}")
    with pytest.raises(ArtifactError, match="too long"):
        canonical.read_layout(io.BytesIO(encoded({}, 0)), 10, "x", max_header=1)


def test_writer_refuses_wrong_sizes_and_layouts_without_a_canonical_form() -> None:
    layout = canonical.layout([TensorSpec("a", "U8", (4,))])
    for wrong in (b"123", b"12345"):
        with pytest.raises(ValueError, match="tensor a has"):
            canonical.write(layout, lambda name, wrong=wrong: [wrong], lambda chunk: None)  # type: ignore[misc]
    with pytest.raises(ValueError, match="F4"):
        canonical.layout([TensorSpec("a", "F4", (4,))])
    with pytest.raises(ValueError, match="unique"):
        canonical.layout([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (2,))])
