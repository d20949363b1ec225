"""A model as plain values."""

from __future__ import annotations

from pathlib import Path

from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.manifest.manifest import BlockEntry, BlockFile, FileEntry, Manifest
from torrentlm.node.describe import describe_blocks
from torrentlm.records import Span
from torrentlm.route.registry import Snapshot

NOBODY = Snapshot((), known=0, answered=0)
NAMES = ["a" * 64 + ".safetensors", "b" * 64 + ".safetensors", "c" * 64 + ".safetensors"]


def manifest() -> Manifest:
    def part(file: int, prefix: str) -> BlockFile:
        return BlockFile(file, (("", prefix),))

    return Manifest(
        name="Tiny",
        architecture="Any",
        dtype="F32",
        layer_stack="stack",
        layers=1,
        blocks=(
            BlockEntry("stem", None, (part(0, "embed."),)),
            BlockEntry("layers", Span(0, 0), (part(1, "stack.0."),)),
            BlockEntry("head", None, (part(2, "norm."), part(0, "embed."))),
        ),
        files=tuple(FileEntry(name, 100, b"1" * 20, b"2" * 32) for name in NAMES),
    )


def write(path: Path, *tensors: TensorSpec) -> Path:
    with path.open("wb") as file:
        canonical.write(canonical.layout(tensors), lambda name: [bytes(24)], file.write)
    return path


def test_tensors_of_the_blocks_that_are_here(tmp_path: Path) -> None:
    embed = write(tmp_path / NAMES[0], TensorSpec("weight", "F32", (3, 2)))
    layer = write(tmp_path / NAMES[1], TensorSpec("q.weight", "F32", (6,)), TensorSpec("k.weight", "BF16", (4, 3)))
    stem, layers, head = describe_blocks(manifest(), NOBODY, {NAMES[0]: embed, NAMES[1]: layer})
    assert stem["tensors"] == [{"name": "embed.weight", "dtype": "F32", "shape": [3, 2]}]
    assert layers["tensors"] == [
        {"name": "stack.0.q.weight", "dtype": "F32", "shape": [6]},
        {"name": "stack.0.k.weight", "dtype": "BF16", "shape": [4, 3]},
    ]
    assert head["tensors"] is None  # one of its two files is not here


def test_a_file_that_is_no_block_is_as_good_as_absent(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).write_bytes(bytes(100))
    stem, *_ = describe_blocks(manifest(), NOBODY, {NAMES[0]: tmp_path / NAMES[0]})
    assert stem["tensors"] is None
