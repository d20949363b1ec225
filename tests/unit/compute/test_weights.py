from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.unit.compute.checkpoints import Blocks, cut, tiny
from torrentlm.compute.border import ALIGNMENT, pack
from torrentlm.compute.weights import Weights
from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.canonical import TensorSpec, layout, write

CPU = torch.device("cpu")


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    packed = {name: pack(tensor) for name, tensor in tensors.items()}
    target = layout(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in packed.items())
    with path.open("wb") as sink:
        write(target, lambda name: [packed[name].data], sink.write)


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return cut(tiny(), tmp_path)


def test_names_dtypes_and_values(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    tensors = {
        "0.w": torch.randn(3, 5),
        "0.h": torch.randn(7).bfloat16(),
        "1.w": torch.randn(4),
        "1.n": torch.tensor([3], dtype=torch.int64),
        "1.e": torch.zeros(0, 4),
    }
    write_file(path, tensors)
    names = [("0.", "model.layers.4."), ("1.", "model.layers.5.")]
    weights = Weights([(path, names)], torch.float32, CPU).tensors
    assert set(weights) == {f"model.layers.{4 + int(name[0])}.{name[2:]}" for name in tensors}
    for name, tensor in tensors.items():
        loaded = weights[f"model.layers.{4 + int(name[0])}.{name[2:]}"]
        assert loaded.dtype == (torch.float32 if tensor.is_floating_point() else torch.int64)
        assert torch.equal(loaded, tensor.to(loaded.dtype))
        assert loaded.data_ptr() % ALIGNMENT == 0
    assert Weights([(path, names)], torch.bfloat16, CPU).tensors["model.layers.4.w"].dtype == torch.bfloat16


def test_spans_share_what_they_load_from_the_same_file(blocks: Blocks) -> None:
    one, other = blocks.runner(0, 3), blocks.runner(2, 5)
    name = "model.layers.2.mlp.up_proj.weight"
    assert one._model.get_parameter(name).data_ptr() == other._model.get_parameter(name).data_ptr()
    cast = blocks.runner(2, 5, torch.bfloat16)
    assert cast._model.get_parameter(name).data_ptr() != one._model.get_parameter(name).data_ptr()


def test_a_file_is_used_in_place(tmp_path: Path) -> None:
    """The tensor's memory is a mapping of the file; what a model's code writes there stays in this process."""
    path = tmp_path / "one.safetensors"
    write_file(path, {"w": torch.ones(256, 256), "odd": torch.ones(3)})
    before = path.read_bytes()
    tensors = Weights([(path, [("", "")])], torch.float32, CPU).tensors
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path.name)]
    assert any(
        int(at.split("-")[0], 16) <= tensors["w"].data_ptr() < int(at.split("-")[1], 16) and mode.endswith("p")
        for at, mode, *_ in ranges
    )
    tensors["w"].mul_(2)
    assert path.read_bytes() == before


def test_a_closed_runner_lets_go_of_its_files_at_once(blocks: Blocks) -> None:
    """Without waiting for the collector, which may be off: its modules refer to each other."""

    def mapped() -> set[str]:
        names = {str(path) for path in blocks.paths}
        return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()} & names

    gc.collect()
    before = mapped()
    gc.disable()
    try:
        runner = blocks.runner(0, 5)
        runner.forward(runner.open(1, 8), torch.tensor([[5, 6, 7]]), 3)
        assert len(mapped()) > len(before)
        runner.close()
        assert mapped() == before
    finally:
        gc.enable()


def damage(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))


def test_broken_files_are_named(blocks: Blocks) -> None:
    path = blocks.files(blocks.planned.blocks[2:3])[0][0]
    whole = path.read_bytes()
    for broken in (whole[:-4], whole[:20], b"", whole + b"1234"):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=path.name):
            blocks.runner(0, 1)
    path.write_bytes(whole)
    damage(path, 0, b"\xff" * 8)
    with pytest.raises(ArtifactError, match=path.name):
        blocks.runner(0, 1)
    path.unlink()
    with pytest.raises(StorageError, match=path.name):
        blocks.runner(0, 1)


def test_a_file_without_what_the_model_needs(blocks: Blocks, tmp_path: Path) -> None:
    path = blocks.files(blocks.planned.blocks[2:3])[0][0]
    write_file(path, {"mlp.up_proj.weight": torch.zeros(48, 32)})
    with pytest.raises(ArtifactError, match=r"lack the tensor model\.layers\.1\."):
        blocks.runner(0, 1)
    stem = blocks.files(blocks.planned.blocks[:1])[0][0]
    write_file(stem, {"embed_tokens.weight": torch.zeros(101, 31)})
    with pytest.raises(ArtifactError, match=r"\[101, 31\]"):
        blocks.runner(0, 0)
    write_file(stem, {"embed_tokens.weight": torch.zeros(101, 32), "stray": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="stray"):
        Weights([(stem, [("embed", "model.embed")])], torch.float32, CPU)
