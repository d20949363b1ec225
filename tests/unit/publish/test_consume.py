"""The checkpoint's weight files go once, and only if, all of them are in the store."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.unit.publish.models import listing, read_back, same_tensors, save_llama
from torrentlm.config import Recipe
from torrentlm.publish.published import Published, magnet_of, recognise
from torrentlm.publish.run import run
from torrentlm.swarm.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "checkpoint", max_shard_size="20KB")
    return tmp_path / "checkpoint"


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    return Recipe("m", folder, consume=True)


def go(recipe: Recipe, store: Store) -> Published:
    return run(recipe, store, lambda done, total, what: None)


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


def test_one_copy_is_left(recipe: Recipe, folder: Path, store: Store, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "same")
    others = set(listing(folder)) - set(weights(folder))
    published = go(recipe, store)
    assert set(listing(folder)) == others
    assert same_tensors(read_back(published, store), model.state_dict())
    assert not list((store.data / "published").glob("*.consuming"))


def test_what_is_left_is_recognised(recipe: Recipe, store: Store) -> None:
    published = go(recipe, store)
    assert recognise(recipe, store) == replace(published, left_out=())
    assert recognise(replace(recipe, consume=False), store) is not None
    assert magnet_of(recipe, store.data) == published.magnet
    assert go(recipe, store) == published


def test_what_was_published_before_can_be_removed(recipe: Recipe, folder: Path, store: Store) -> None:
    first = go(replace(recipe, consume=False), store)
    assert len(weights(folder)) > 3
    assert go(recipe, store) == first
    assert weights(folder) == []


def test_a_killed_removal_is_finished(
    recipe: Recipe, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Path.unlink, iter(range(100))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent == folder and next(calls) == 2:
            raise KeyboardInterrupt
        original(path, missing_ok=missing_ok)

    count = len(weights(folder))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        go(recipe, store)
    assert len(weights(folder)) == count - 2
    published = go(recipe, store)
    assert weights(folder) == []
    assert magnet_of(recipe, store.data) == published.magnet


def keeps(recipe: Recipe, store: Store, caplog: pytest.LogCaptureFixture, why: str) -> None:
    folder = recipe.folder
    assert folder is not None
    before = listing(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        go(recipe, store)
    assert listing(folder) == before
    [said] = caplog.messages
    assert said.startswith(f"the weights in {folder} are kept: ")
    assert why in said


def test_another_precision_is_no_copy(recipe: Recipe, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    keeps(replace(recipe, dtype="F16"), store, caplog, "no block has tensor model.embed_tokens.weight of ")


def test_a_tensor_that_no_block_has_is_kept(tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "single"
    save_llama(folder)
    path = folder / "model.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "extra": torch.ones(1)}, path)
    keeps(Recipe("m", folder, consume=True), store, caplog, "no block has tensor extra of model.safetensors")


def test_a_damaged_block_is_no_copy(
    recipe: Recipe, folder: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    published = go(replace(recipe, consume=False), store)
    path = store.path(published.manifest.files[1].name)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a bad disk would do it
    keeps(recipe, store, caplog, f"{path} is not what was written")


def test_a_source_that_changed_meanwhile_is_kept(recipe: Recipe, folder: Path, store: Store) -> None:
    shard = folder / weights(folder)[0]

    def touch(done: int, total: int, what: str) -> None:
        os.utime(shard, ns=(1, 1))

    before = listing(folder)
    run(recipe, store, touch)
    assert listing(folder) == before


def test_a_file_that_came_later_is_left_alone(recipe: Recipe, folder: Path, store: Store) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"not in the index")
    published = go(recipe, store)
    assert go(recipe, store) == published
    assert weights(folder) == ["consolidated.safetensors"]
