"""A model as plain values."""

from __future__ import annotations

from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.manifest.manifest import BlockEntry, BlockFile, FileEntry, Manifest, Side
from torrentlm.node.describe import describe_blocks
from torrentlm.records import Span
from torrentlm.route.registry import Snapshot

NOBODY = Snapshot((), known=0, answered=0)
EMBED = canonical.layout([TensorSpec("weight", "F32", (3, 2))])
LAYER = canonical.layout([TensorSpec("q.weight", "F32", (6,)), TensorSpec("k.weight", "BF16", (4, 3))])


def manifest() -> Manifest:
    """The head needs the stem's file too; the two layers have equal names, so one layout."""

    def part(file: int, prefix: str) -> BlockFile:
        return BlockFile(file, (("", prefix),))

    return Manifest(
        name="Tiny",
        architecture="Any",
        dtype="F32",
        sides=(Side("stack", 2),),
        blocks=(
            BlockEntry("stem", None, (part(0, "embed."),)),
            BlockEntry("layers", Span(0, 0), (part(1, "stack.0."),)),
            BlockEntry("layers", Span(1, 1), (part(2, "stack.1."),)),
            BlockEntry("head", None, (part(3, "norm."), part(0, "embed."))),
        ),
        files=tuple(
            FileEntry(letter * 64 + ".safetensors", (EMBED, LAYER)[layout].size, b"1" * 20, b"2" * 32, layout)
            for letter, layout in (("a", 0), ("b", 1), ("c", 1), ("d", 0))
        ),
        layouts=(EMBED, LAYER),
    )


def test_every_block_has_its_tensors_under_the_models_names() -> None:
    stem, first, second, head = describe_blocks(manifest(), NOBODY)
    embed = {"name": "embed.weight", "dtype": "F32", "shape": [3, 2]}
    assert stem["tensors"] == [embed]
    for number, layer in enumerate((first, second)):
        assert layer["tensors"] == [
            {"name": f"stack.{number}.q.weight", "dtype": "F32", "shape": [6]},
            {"name": f"stack.{number}.k.weight", "dtype": "BF16", "shape": [4, 3]},
        ]
    assert head["tensors"] == [{"name": "norm.weight", "dtype": "F32", "shape": [3, 2]}, embed]
