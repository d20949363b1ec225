from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest.manifest import BlockEntry, BlockFile, FileEntry, Manifest
from torrentlm.records import Span


def file(number: int) -> FileEntry:
    digest = number.to_bytes(32, "big")
    return FileEntry(f"{digest.hex()}.safetensors", 100 + number, digest[12:], digest)


def example(per_block: int = 2, layers: int = 5) -> Manifest:
    spans = [Span(first, min(first + per_block, layers) - 1) for first in range(0, layers, per_block)]
    blocks = [BlockEntry("stem", None, (BlockFile(0, (("", "model."),)),))]
    for number, span in enumerate(spans):
        names = tuple((f"{i}.", f"model.layers.{layer}.") for i, layer in enumerate(span))
        blocks.append(BlockEntry("layers", span, (BlockFile(1 + number, names),)))
    head = (BlockFile(1 + len(spans), (("", "model."), ("lm_head.", "lm_head."))), BlockFile(0, (("", "model."),)))
    blocks.append(BlockEntry("head", None, head))
    files = tuple(file(number) for number in range(len(spans) + 2))
    return Manifest("A model", "LlamaForCausalLM", "F32", "model.layers", layers, tuple(blocks), files)


@given(st.integers(1, 4), st.integers(1, 20))
def test_round_trip_is_canonical(per_block: int, layers: int) -> None:
    manifest = example(per_block, layers)
    encoded = manifest.to_bytes()
    assert Manifest.from_bytes(encoded) == manifest
    assert Manifest.from_bytes(encoded).to_bytes() == encoded
    keys = list(msgpack.unpackb(encoded))
    assert keys == sorted(keys)


def test_files_and_labels() -> None:
    manifest = example()
    assert manifest.span_files(0, 1) == manifest.files[:2]
    assert manifest.span_files(0, 4) == (*manifest.files[:4], manifest.files[4])
    assert manifest.block_files(4) == (manifest.files[4], manifest.files[0])
    assert manifest.size == 100 + 101 + 102 + 103 + 104
    labels = [manifest.block_label(block) for block in range(5)]
    assert labels == [
        "block 0 (stem)",
        "block 1 (layers 0-1)",
        "block 2 (layers 2-3)",
        "block 3 (layer 4)",
        "block 4 (head)",
    ]


def test_full_names() -> None:
    head = example().blocks[-1].files[0]
    assert head.full_name("norm.weight") == "model.norm.weight"
    assert head.full_name("lm_head.weight") == "lm_head.weight"
    assert example().blocks[1].files[0].full_name("1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ArtifactError):
        BlockFile(0, (("0.", "x."),)).full_name("1.a")


def block(number: int, **changes: object) -> Manifest:
    manifest = example()
    blocks = list(manifest.blocks)
    blocks[number] = replace(blocks[number], **changes)  # type: ignore[arg-type]
    return replace(manifest, blocks=tuple(blocks))


@pytest.mark.parametrize(
    "manifest",
    [
        replace(example(), blocks=example().blocks[1:]),
        replace(example(), blocks=example().blocks[:-1]),
        replace(example(), blocks=()),
        replace(example(), layers=4),
        replace(example(), layers=6),
        replace(example(), files=example().files[:-1]),
        replace(example(), files=(*example().files, file(9))),
        replace(example(), files=(*example().files[:-1], example().files[0])),
        replace(example(), files=(*example().files[:-1], replace(file(9), name="../../x"))),
        replace(example(), files=(*example().files[:-1], replace(file(9), size=-1))),
        replace(example(), files=(*example().files[:-1], replace(file(9), v1=bytes(19)))),
        replace(example(), name=""),
        replace(example(), name="x" * 513),
        replace(example(), dtype="Q4"),
        replace(example(), task="poetry"),
        replace(example(), layer_stack="model..layers"),
        replace(example(), layer_stack="a b"),
        block(0, kind="layers"),
        block(0, layers=Span(0, 0)),
        block(1, layers=None),
        block(1, layers=Span(1, 2)),
        block(2, layers=Span(0, 2**40)),
        block(2, kind="core"),
        block(1, files=(BlockFile(99, ()),)),
    ],
)
def test_refuses_what_does_not_fit_together(manifest: Manifest) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(manifest.to_bytes())


def test_other_versions_are_named() -> None:
    content = msgpack.unpackb(example().to_bytes())
    with pytest.raises(ArtifactError, match="version 2"):
        Manifest.from_bytes(msgpack.packb({**content, "version": 2}))
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(msgpack.packb({**content, "extra": 1}))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(msgpack.unpackb(example().to_bytes()))), VALUES)
def test_any_value_in_any_field_is_refused_or_survives(key: str, value: object) -> None:
    data = msgpack.packb({**msgpack.unpackb(example().to_bytes()), key: value})
    try:
        manifest = Manifest.from_bytes(data)
    except ArtifactError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@given(st.binary(max_size=60) | st.integers(0, 400).map(lambda cut: example().to_bytes()[:cut]))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(data)
