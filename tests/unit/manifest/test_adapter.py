"""The adapter's manifest: one encoding, and a reader that takes nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest import canonical
from torrentlm.manifest.adapter import AdapterBlock, AdapterManifest
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.manifest.manifest import BlockFile, FileEntry
from torrentlm.records import AdapterId, Span


def lora(name: str, rank: int = 2, into: int = 5, out: int = 3, dtype: str = "F32") -> list[TensorSpec]:
    return [
        TensorSpec(f"{name}.lora_A.weight", dtype, (rank, into)),
        TensorSpec(f"{name}.lora_B.weight", dtype, (out, rank)),
    ]


LAYOUT = canonical.layout([*lora("q"), *lora("k", dtype="BF16")])


def entry(letter: str, layout: int = 0) -> FileEntry:
    return FileEntry(letter * 64 + ".safetensors", LAYOUT.size, b"1" * 20, b"2" * 32, layout)


MANIFEST = AdapterManifest(
    "pirate",
    AdapterId(b"a" * 20, b"b" * 32),
    (
        AdapterBlock(1, BlockFile(0, (("", "h.0."),)), (0.5, 2.0)),
        AdapterBlock(2, BlockFile(1, (("", "h.1."),)), (0.5, 2.0)),
        AdapterBlock(4, BlockFile(0, (("", "h.3."),)), (0.25, 1.0)),
    ),
    (entry("a"), entry("b")),
    (LAYOUT,),
)


def test_it_comes_back_as_it_was() -> None:
    assert AdapterManifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.touched == {1, 2, 4}
    assert MANIFEST.size == 2 * LAYOUT.size
    assert MANIFEST.scalings(MANIFEST.blocks[2]) == {"h.3.k": 0.25, "h.3.q": 1.0}
    assert [entry.block for entry in MANIFEST.within(Span(2, 9))] == [2, 4]
    assert [file.name[0] for file in MANIFEST.span_files(Span(4, 4))] == ["a"]
    assert MANIFEST.within(Span(3, 3)) == ()


def layout_of(*specs: TensorSpec) -> dict[str, Any]:
    layout = canonical.layout(specs)
    return {"layouts": (layout,), "files": tuple(replace(file, size=layout.size) for file in MANIFEST.files)}


first, second, third = MANIFEST.blocks
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"blocks": ()}, "out of order"),
    ({"blocks": (second, first, third)}, "out of order"),
    ({"blocks": (first, replace(second, block=1), third)}, "out of order"),
    ({"blocks": (first, replace(second, used=BlockFile(0, (("", "h.1."),))), third)}, "disagree"),
    ({"blocks": (first, replace(second, used=BlockFile(2, (("", "h.1."),))), third)}, "disagree"),
    ({"blocks": (first, second, replace(third, used=BlockFile(0, (("", "h.0."),))))}, "twice"),
    ({"blocks": (first, second, replace(third, used=BlockFile(0, (("x", "h.3."),))))}, "does not say"),
    ({"blocks": (first, second, replace(third, scalings=(1.0,)))}, "shorter"),
    ({"blocks": (first, second, replace(third, scalings=(1.0, float("nan"))))}, "no number"),
    ({"files": (entry("a"), entry("a"))}, "twice"),
    ({"files": (entry("a"), replace(entry("b"), size=1))}, "1 bytes"),
    ({"files": (replace(entry("a"), name="../up.safetensors"), entry("b"))}, "not named"),
    ({"base": AdapterId(b"a" * 19, b"b" * 32)}, "not 20 bytes"),
    (layout_of(*lora("q"), TensorSpec("k.bias", "F32", (3,))), "neither an A nor a B"),
    (layout_of(*lora("q"), lora("k")[0]), "lacks .lora_B"),
    (layout_of(*lora("q"), *lora("k", dtype="I32")), "another kind"),
    (layout_of(*lora("q"), *lora("k", rank=0)), "shapes"),
    (layout_of(*lora("q"), lora("k")[0], lora("k", rank=3)[1]), "shapes"),
    (layout_of(*lora("q"), lora("k")[0], TensorSpec("k.lora_B.weight", "F32", (2,))), "shapes"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    data = replace(MANIFEST, **changes).to_bytes()
    with pytest.raises(ArtifactError, match=says) as error:
        AdapterManifest.from_bytes(data)
    assert "\n" not in str(error.value)


def test_another_encoding_is_refused() -> None:
    content = msgpack.unpackb(MANIFEST.to_bytes())
    for data in (
        msgpack.packb(dict(reversed(content.items()))),
        MANIFEST.to_bytes() + b"\x00",
        msgpack.packb(content | {"more": 1}),
        msgpack.packb(content | {"version": 2}),
        b"",
    ):
        with pytest.raises(ArtifactError):
            AdapterManifest.from_bytes(data)


@given(st.data())
def test_nonsense_is_refused_and_nothing_worse(data: st.DataObject) -> None:
    content = bytearray(MANIFEST.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = AdapterManifest.from_bytes(bytes(content))
    except ArtifactError:
        return
    assert found.to_bytes() == content
