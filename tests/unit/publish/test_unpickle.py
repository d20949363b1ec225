"""Pickled checkpoints, converted on demand: the same tensors, and nothing run."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.unit.publish.models import listing, same_tensors, save_llama
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, StorageError
from torrentlm.publish.publish import publish
from torrentlm.publish.unpickle import convert_folder
from torrentlm.swarm.store import Store


def pickled(folder: Path, name: str = "pytorch_model.bin", **saving: Any) -> dict[str, torch.Tensor]:
    """A tiny checkpoint whose weights are one pickle."""
    save_llama(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name, **saving)
    return tensors


def convert(folder: Path) -> list[str]:
    return [path.name for path in convert_folder(folder)]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "m.pth"])
def test_the_tensors_arrive(name: str, zipped: bool, tmp_path: Path) -> None:
    tensors = pickled(tmp_path, name, _use_new_zipfile_serialization=zipped)
    torch.save({"lr": torch.ones(1)}, tmp_path / "optimizer.bin")
    assert convert(tmp_path) == ["model.safetensors"]
    assert same_tensors(safetensors.torch.load_file(tmp_path / "model.safetensors"), tensors)
    assert (tmp_path / name).exists()
    assert not list(tmp_path.glob("*.part"))


def test_shards_and_what_is_published_then(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    tensors = pickled(folder)
    names = sorted(tensors)
    (folder / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, own in shards.items():
        torch.save({name: tensors[name] for name in own}, folder / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    save_llama(tmp_path / "plain")
    with Store(tmp_path / "data") as store:
        before = listing(store.data)
        with pytest.raises(ArtifactError, match=r"is a pickle.*torrentlm convert"):
            publish(Recipe("m", folder), store)
        assert listing(store.data) == before
        assert convert(folder) == [
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        ]  # fmt: skip
        magnet = publish(Recipe("m", folder), store).magnet
        assert publish(Recipe("m", tmp_path / "plain"), store).magnet == magnet


def test_views_wrappers_and_odd_shapes(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tensors = {"t": base.t(), "row": base[1], "scalar": torch.tensor(7), "empty": torch.zeros(0, 2), "flag": base > 3}
    torch.save({"epoch": 3, "state_dict": OrderedDict(tensors, note="no tensor")}, tmp_path / "x.pt")
    convert(tmp_path)
    assert same_tensors(safetensors.torch.load_file(tmp_path / "model.safetensors"), tensors)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run(zipped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    evil = {"a": torch.ones(1), "b": Evil(tmp_path / "was-run")}
    torch.save(evil, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, "holds more than tensors, which were not run")
    assert not (tmp_path / "was-run").exists()


def refused(folder: Path, match: str, error: type[Exception] = ArtifactError) -> None:
    before = listing(folder)
    with pytest.raises(error, match=match) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no folder")
    refused(tmp_path, "no pickled weights")
    (tmp_path / "a.bin").write_bytes(b"junk")
    refused(tmp_path, "is damaged or holds")
    (tmp_path / "b.bin").write_bytes(b"PK\x03\x04junk")
    refused(tmp_path, r"several pickles \(a\.bin, b\.bin\)")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../a.bin"}}')
    refused(tmp_path, "not a usable index")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "c.bin"}}')
    refused(tmp_path, r"c\.bin is missing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "has safetensors already")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.ones(1), {"a": torch.ones(2).to_sparse()}])
def test_no_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.bin")
    refused(tmp_path, "no named tensors|convert it to plain numbers")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(tmp_path, r"cannot write safetensors into .* \(no space left", StorageError)
