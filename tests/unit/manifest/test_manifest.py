from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import Layout, TensorSpec
from torrentlm.manifest.manifest import MAX_TENSORS, BlockEntry, BlockFile, FileEntry, Manifest, Rewind, Side
from torrentlm.records import Span

EMBED = canonical.layout([TensorSpec("embed_tokens.weight", "BF16", (7, 4))])
HEAD = canonical.layout([TensorSpec("norm.weight", "F32", (4,)), TensorSpec("lm_head.weight", "BF16", (7, 4))])
LAYER = (
    TensorSpec("norm.weight", "F32", (4,)),
    TensorSpec("up.weight", "BF16", (3, 4)),
    TensorSpec("mask", "BOOL", ()),
)


def file(number: int, layout: int = 0, size: int = EMBED.size) -> FileEntry:
    digest = number.to_bytes(32, "big")
    return FileEntry(f"{digest.hex()}.safetensors", size, digest[12:], digest, layout)


def example(per_block: int = 2, layers: int = 5) -> Manifest:
    spans = [Span(first, min(first + per_block, layers) - 1) for first in range(0, layers, per_block)]
    blocks = [BlockEntry("stem", None, (BlockFile(0, (("", "model."),)),))]
    for number, span in enumerate(spans):
        names = tuple((f"{i}.", f"model.layers.{layer}.") for i, layer in enumerate(span))
        blocks.append(BlockEntry("layers", span, (BlockFile(1 + number, names),)))
    head = (BlockFile(1 + len(spans), (("", "model."), ("lm_head.", "lm_head."))), BlockFile(0, (("", "model."),)))
    blocks.append(BlockEntry("head", None, head))
    of_files = [EMBED, *(layers_layout(len(span)) for span in spans), HEAD]
    layouts = tuple(dict.fromkeys(of_files))
    files = tuple(file(number, layouts.index(layout), layout.size) for number, layout in enumerate(of_files))
    sides = (Side("model.layers", layers),)
    return Manifest("A model", "LlamaForCausalLM", "F32", sides, tuple(blocks), files, layouts)


def two_sided() -> Manifest:
    """An encoder of two layers and a decoder of three, which share the embedding."""
    shared = (BlockFile(0, (("", "shared."),)),)
    blocks = [BlockEntry("stem", None, shared, "replay")]
    for side, layers in (("encoder", 2), ("decoder", 3)):
        if side == "decoder":
            blocks.append(BlockEntry("stem", None, shared))
        for layer in range(layers):
            names = (("0.", f"{side}.block.{layer}."),)
            rewind: Rewind = "replay" if side == "encoder" else "trim"
            blocks.append(BlockEntry("layers", Span(layer, layer), (BlockFile(1 + layer, names),), rewind))
        blocks.append(BlockEntry("head", None, (BlockFile(4, (("", f"{side}."),)),)))
    of_files = [EMBED, *[layers_layout(1)] * 3, HEAD]
    layouts = tuple(dict.fromkeys(of_files))
    files = tuple(file(number, layouts.index(layout), layout.size) for number, layout in enumerate(of_files))
    sides = (Side("encoder.block", 2, encoder=True), Side("decoder.block", 3, chunks=False))
    return Manifest("A model", "Any", "F32", sides, tuple(blocks), files, layouts)


def layers_layout(count: int) -> Layout:
    return canonical.layout(replace(spec, name=f"{place}.{spec.name}") for place in range(count) for spec in LAYER)


@pytest.mark.parametrize("floor", ["F32", "INT8"])
def test_a_floor_is_there_only_where_a_publisher_states_one(floor: str) -> None:
    assert b"floor" not in example().to_bytes()
    assert_canonical(replace(example(), floor=floor))


def test_an_unknown_floor_is_refused() -> None:
    for floor in ("INT2", "", None, 4):
        content = msgpack.unpackb(example().to_bytes()) | {"floor": floor}
        with pytest.raises(ArtifactError, match="floor"):
            Manifest.from_bytes(msgpack.packb(dict(sorted(content.items()))))


def assert_canonical(manifest: Manifest) -> None:
    encoded = manifest.to_bytes()
    assert Manifest.from_bytes(encoded) == manifest
    assert Manifest.from_bytes(encoded).to_bytes() == encoded
    content = msgpack.unpackb(encoded)
    for item in (content, *content["blocks"], *content["files"], *content["sides"]):
        assert list(item) == sorted(item)


@given(st.integers(1, 4), st.integers(1, 20))
def test_round_trip_is_canonical(per_block: int, layers: int) -> None:
    assert_canonical(example(per_block, layers))


TABLES = st.lists(
    st.builds(
        TensorSpec,
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(canonical.DTYPE_BYTES)),
        st.lists(st.integers(0, 2**16), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
).map(canonical.layout)


@given(st.lists(TABLES, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=3, max_size=12))
def test_any_layouts_survive(tables: list[Layout], choice: list[int]) -> None:
    of_files = [tables[number % len(tables)] for number in choice]
    layouts = tuple(dict.fromkeys(of_files))
    files = tuple(file(number, layouts.index(layout), layout.size) for number, layout in enumerate(of_files))
    blocks = [
        BlockEntry("layers", Span(number, number), (BlockFile(number + 1, (("", f"h.{number}."),)),))
        for number in range(len(files) - 2)
    ]
    stem = BlockEntry("stem", None, (BlockFile(0, (("", ""),)),))
    head = BlockEntry("head", None, (BlockFile(len(files) - 1, (("", "x."),)),))
    manifest = Manifest("A", "B", "F32", (Side("h", len(blocks)),), (stem, *blocks, head), files, layouts)
    assert_canonical(manifest)
    for number in range(len(blocks)):
        assert manifest.block_tensors(number + 1) == tuple(
            replace(spec, name=f"h.{number}.{spec.name}") for spec in of_files[number + 1].specs
        )


def test_two_sides() -> None:
    manifest = two_sided()
    assert_canonical(manifest)
    assert (manifest.task, manifest.layers) == ("seq2seq", 5)
    assert [manifest.side_blocks(side) for side in range(2)] == [Span(0, 3), Span(4, 8)]
    assert [manifest.side_of(block) for block in range(9)] == [0] * 4 + [1] * 5
    assert manifest.block_label(5) == "block 5 (layer 0)"
    assert_canonical(with_side(layer_stack="model.attention+model.ffns"))


def test_one_side_is_for_text_or_an_encoder() -> None:
    assert (example().task, example().side_blocks(0), example().side_of(4)) == ("causal-lm", Span(0, 4), 0)
    assert with_side(encoder=True).task == "encoder"


def test_files_and_labels() -> None:
    manifest = example()
    assert manifest.span_files(0, 1) == manifest.files[:2]
    assert manifest.span_files(0, 4) == (*manifest.files[:4], manifest.files[4])
    assert manifest.block_files(4) == (manifest.files[4], manifest.files[0])
    assert manifest.size == EMBED.size + 2 * layers_layout(2).size + layers_layout(1).size + HEAD.size
    assert [entry.layout for entry in manifest.files] == [0, 1, 1, 2, 3]
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


def test_tensors_have_the_names_of_their_block() -> None:
    manifest = example()
    assert [spec.name for spec in manifest.block_tensors(4)] == [
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]
    assert TensorSpec("model.layers.3.up.weight", "BF16", (3, 4)) in manifest.block_tensors(2)


def block(number: int, **changes: object) -> Manifest:
    manifest = example()
    blocks = list(manifest.blocks)
    blocks[number] = replace(blocks[number], **changes)  # type: ignore[arg-type]
    return replace(manifest, blocks=tuple(blocks))


def with_side(**changes: object) -> Manifest:
    return replace(example(), sides=(replace(example().sides[0], **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "manifest",
    [
        replace(example(), blocks=example().blocks[1:]),
        replace(example(), blocks=example().blocks[:-1]),
        replace(example(), blocks=()),
        with_side(layers=4),
        with_side(layers=6),
        with_side(layers=-1),
        with_side(chunks=1),
        with_side(encoder=None),
        replace(example(), sides=()),
        replace(example(), sides=example().sides * 2),
        replace(two_sided(), sides=two_sided().sides[:1]),
        replace(two_sided(), sides=two_sided().sides[::-1]),
        replace(two_sided(), sides=tuple(replace(side, encoder=False) for side in two_sided().sides)),
        replace(two_sided(), sides=two_sided().sides[:1] * 3),
        replace(two_sided(), blocks=two_sided().blocks[:4]),
        replace(two_sided(), blocks=two_sided().blocks * 2, sides=two_sided().sides * 2),
        replace(example(), files=example().files[:-1]),
        replace(example(), files=(*example().files, file(9))),
        replace(example(), files=(*example().files[:-1], example().files[0])),
        replace(example(), files=(*example().files[:-1], replace(file(9), name="../../x"))),
        replace(example(), files=(*example().files[:-1], replace(file(9), size=-1))),
        replace(example(), files=(*example().files[:-1], replace(file(9), v1=bytes(19)))),
        replace(example(), name=""),
        replace(example(), name="x" * 513),
        replace(example(), dtype="Q4"),
        with_side(layer_stack="model..layers"),
        with_side(layer_stack="a b"),
        with_side(layer_stack="a++b"),
        with_side(layer_stack="a+"),
        block(1, rewind="backwards"),
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


def tampered(layouts: object = None, **of_first_file: object) -> bytes:
    content = msgpack.unpackb(example().to_bytes())
    content["files"][0] |= of_first_file
    return bytes(msgpack.packb(content if layouts is None else {**content, "layouts": layouts}))


def encoded_layouts(first: object) -> list[object]:
    return [first, *msgpack.unpackb(example().to_bytes())["layouts"][1:]]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (tampered(layout=4), "a file has layout 4, and there are 4"),
        (tampered(layout=-1), "layout is out of range"),
        (tampered(layout=True), "layout is not of type int"),
        (tampered(layout=1), "not in the order of their first use"),
        (tampered(size=EMBED.size + 1), f"has {EMBED.size + 1} bytes where its layout makes {EMBED.size}"),
        (tampered({}), "layouts is not of type list"),
        (tampered([]), "a file has layout 0, and there are 0"),
        (tampered([*encoded_layouts([["embed_tokens.weight", "BF16", [7, 4]]]), []]), "no file has layout 4"),
        (tampered(encoded_layouts({})), "a layout is not a list of tensors"),
        (tampered(encoded_layouts([None])), "an entry of a list is malformed"),
        (tampered(encoded_layouts([["a", "F32"]])), "an entry of a list is malformed"),
        (tampered(encoded_layouts([["a", "F32", [1], 1]])), "an entry of a list is malformed"),
        (tampered(encoded_layouts([["", "F32", [1]]])), "a tensor's name is empty or too long"),
        (tampered(encoded_layouts([["a" * 513, "F32", [1]]])), "a tensor's name is empty or too long"),
        (tampered(encoded_layouts([["a", "Q4", [1]]])), "tensor 'a' has the unknown dtype 'Q4'"),
        (tampered(encoded_layouts([["a", "F32", [1] * 17]])), "tensor 'a' has 17 dimensions"),
        (tampered(encoded_layouts([["a", "F32", [-1]]])), "the shape of tensor 'a' is out of range"),
        (tampered(encoded_layouts([["a", "F32", [2**63]]])), "the shape of tensor 'a' is out of range"),
        (tampered(encoded_layouts([["a", "F32", [True]]])), "the shape of tensor 'a' is out of range"),
        (tampered(encoded_layouts([["a", "F32", [1.0]]])), "the shape of tensor 'a' is out of range"),
        (tampered(encoded_layouts([["a", "F32", [2**62] * 16]])), "bytes where its layout makes"),
        (tampered(encoded_layouts([["a", "U8", [1]], ["a", "U8", [1]]])), "tensor names are not unique"),
        (tampered(encoded_layouts([["__metadata__", "U8", [1]]])), "a tensor cannot be named __metadata__"),
        (tampered(encoded_layouts([["b", "U8", [1]], ["a", "U8", [1]]])), "not in the canonical order"),
        (tampered(encoded_layouts([["a", "U8", [1]], ["b", "F32", [1]]])), "not in the canonical order"),
        (tampered(encoded_layouts([["a", "U8", [1]]] * (MAX_TENSORS - 2))), "its layouts have too many tensors"),
        (tampered(encoded_layouts([["a", "U8", [1]]] * (MAX_TENSORS + 1))), "exceeds max_array_len"),
        (tampered([*encoded_layouts([])[1:], *[[]] * 65_534]), "layouts has too many entries"),
    ],
)
def test_refuses_layouts_with_a_reason(data: bytes, sentence: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_bytes(data)
    assert sentence in str(caught.value)


def test_refuses_another_encoding_of_the_same_model() -> None:
    data = example().to_bytes()
    content = msgpack.unpackb(data)
    longer = data.replace(msgpack.packb("layers") + b"\x05", msgpack.packb("layers") + b"\xcc\x05")
    assert msgpack.unpackb(longer) == content and longer != data
    for other in (longer, msgpack.packb(dict(reversed(content.items())))):
        with pytest.raises(ArtifactError, match="canonical way"):
            Manifest.from_bytes(other)


def test_refuses_a_layout_listed_twice() -> None:
    manifest = example(1, 2)
    embed, layer, head = manifest.layouts
    files = tuple(replace(entry, layout=number) for number, entry in enumerate(manifest.files))
    with pytest.raises(ArtifactError, match="a layout is listed twice"):
        Manifest.from_bytes(replace(manifest, files=files, layouts=(embed, layer, layer, head)).to_bytes())


def test_refuses_tensors_without_a_name_of_their_own() -> None:
    nameless = block(1, files=(BlockFile(1, (("0.", "model.layers.0."),)),))
    with pytest.raises(ArtifactError, match=r"does not say what tensor '1\..*' is"):
        Manifest.from_bytes(nameless.to_bytes())
    clash = block(1, files=(BlockFile(1, (("0.", "x."), ("1.", "x."))),))
    with pytest.raises(ArtifactError, match=r"block 1 \(layers 0-1\) has two tensors of one name"):
        Manifest.from_bytes(clash.to_bytes())
    twice = block(1, files=(BlockFile(1, (("", "x."),)), BlockFile(1, (("", "x."),))))
    with pytest.raises(ArtifactError, match="two tensors of one name"):
        Manifest.from_bytes(twice.to_bytes())
    with pytest.raises(ArtifactError, match="a prefix of tensors' names is too long"):
        Manifest.from_bytes(block(1, files=(BlockFile(1, (("", "x" * 513),)),)).to_bytes())


def test_a_small_manifest_cannot_name_more_tensors_than_a_large_one() -> None:
    wide = canonical.layout(TensorSpec(f"{number}", "U8", ()) for number in range(1000))
    manifest = example(1, 300)
    files = tuple(
        replace(entry, size=wide.size) if entry.layout == 1 else entry
        for entry in (replace(entry, layout=min(entry.layout, 2)) for entry in manifest.files)
    )
    blocks = tuple(
        replace(entry, files=(BlockFile(entry.files[0].file, (("", "x."),)),)) if entry.layers else entry
        for entry in manifest.blocks
    )
    many = replace(manifest, layouts=(EMBED, wide, HEAD), files=files, blocks=blocks)
    with pytest.raises(ArtifactError, match="its blocks have too many tensors"):
        Manifest.from_bytes(many.to_bytes())


def test_other_versions_are_named() -> None:
    content = msgpack.unpackb(example().to_bytes())
    with pytest.raises(ArtifactError, match="version 3"):
        Manifest.from_bytes(msgpack.packb({**content, "version": 3}))
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


@given(st.binary(max_size=60) | st.integers(0, 1000).map(lambda cut: example().to_bytes()[:cut]))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(data)
