from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.unit.publish.ggufs import LAYER_TENSORS, write_gguf
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.publish import gguf_file
from torrentlm.publish.gguf_directory import read_directory
from torrentlm.publish.gguf_file import GGUFFile
from torrentlm.publish.source import Source

KINDS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0")]


def tensor(source: Source, name: str) -> torch.Tensor:
    data = b"".join(source.read(name))
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.tensors[name].shape)


@pytest.mark.parametrize("architecture", sorted(LAYER_TENSORS))
@pytest.mark.parametrize("kind", KINDS[2:4], ids=lambda kind: kind.name)
def test_tensors_are_those_of_transformers_loader(
    architecture: str, kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file=path.name))
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    monkeypatch.setattr(gguf_file, "CHUNK", 1000)  # several slices per tensor
    source = GGUFFile(path)
    assert set(expected) == set(source.tensors)
    assert set(model.state_dict()) - set(expected) <= {"lm_head.weight"}
    for name, values in expected.items():
        assert torch.equal(tensor(source, name), values), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_directory_agrees_with_the_gguf_package(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", kind, alignment=64)
    architecture, stored = read_directory(path)
    assert architecture == "llama"
    for ours, theirs in zip(stored, GGUFReader(path).tensors, strict=True):
        assert (ours.name, ours.kind, ours.start) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.nbytes == theirs.n_bytes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, "llama", GGMLQuantizationType.Q8_0)
    return path


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_seen_or_harmless(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(small.read_bytes())
    at = data.draw(st.integers(0, 3000))
    content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8) | st.just(b"\xff" * 8))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([at + 4, len(content)]))])
    with contextlib.suppress(ArtifactError):
        _, stored = read_directory(path)
        assert all(tensor.start + tensor.nbytes <= len(content) for tensor in stored)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF\0\0\0\3" + bytes(100)])
def test_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.gguf is not a usable GGUF file"):
        GGUFFile(tmp_path / "x.gguf")


def test_truncated(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="ends before its tensors do"):
        GGUFFile(tmp_path / "x.gguf")


def test_unknown_architecture(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small.read_bytes().replace(b"llama", b"llimo"))
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot read .*x\.gguf"):
        GGUFFile(tmp_path / "x.gguf")


def test_no_tokenizer_is_said_in_one_sentence(small: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="makes no tokenizer") as caught:
        GGUFFile(small).files()
    assert "\n" not in str(caught.value)


def test_shape_that_the_model_does_not_have(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    at = content.index(b"output_norm.weight") + len(b"output_norm.weight")
    shorter = content[: at + 4] + (32).to_bytes(8, "little") + content[at + 12 :]
    (tmp_path / "x.gguf").write_bytes(shorter)
    source = GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(ArtifactError, match=r"gives shape \(32,\) for model\.norm\.weight, the model has \(64,\)"):
        tensor(source, "model.norm.weight")


def test_a_kind_that_cannot_be_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", GGMLQuantizationType.Q8_0)

    def not_yet(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    monkeypatch.setattr(gguf_file, "dequantize", not_yet)
    with pytest.raises(UnsupportedModelError, match="not yet implemented"):
        tensor(GGUFFile(path), "model.norm.weight")
