from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig

from tests.unit.publish.models import LAYERS, TOKENIZER, listing, read_back, same_tensors, save_llama
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, ConfigError, StorageError, UnsupportedModelError
from torrentlm.manifest.canonical import read_canonical
from torrentlm.manifest.manifest import Manifest, Side
from torrentlm.manifest.torrent import Torrent, pieces_root
from torrentlm.publish import publish as publishing
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published, recognise
from torrentlm.records import Span
from torrentlm.swarm.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def published_bytes(published: Published) -> list[bytes]:
    return [published.model.to_bytes(), *(torrent.to_bytes() for torrent in published.torrents)]


def published_in(data: Path, recipe: Recipe) -> list[bytes]:
    with Store(data) as store:
        return published_bytes(publish(recipe, store))


def test_every_tensor_arrives(tmp_path: Path, store: Store) -> None:
    model = save_llama(tmp_path / "checkpoint")
    seen: list[tuple[int, int, str]] = []
    published = publish(Recipe("A model!", tmp_path / "checkpoint"), store, lambda *step: seen.append(step))
    assert same_tensors(read_back(published, store), model.state_dict())
    manifest = published.manifest
    assert (manifest.name, manifest.architecture, manifest.dtype) == ("A model!", "LlamaForCausalLM", "F32")
    assert (manifest.sides, manifest.task) == ((Side("model.layers", LAYERS),), "causal-lm")
    assert {block.rewind for block in manifest.blocks} == {"trim"}
    assert [block.kind for block in manifest.blocks] == ["stem", *["layers"] * LAYERS, "head"]
    assert published.left_out == ()
    assert seen[0][:2] == (0, 1)
    written = [step for step in seen if step[2] != "proof"]
    assert written[-1] == (manifest.size, manifest.size, "head")
    assert [done for done, *_ in written] == sorted(done for done, *_ in written)
    assert seen[-1] == (manifest.size, manifest.size, "proof")


def test_what_lies_in_the_store(folder: Path, store: Store) -> None:
    published = publish(Recipe("A model!", folder), store)
    for entry, torrent in zip(published.manifest.files, published.torrents, strict=True):
        path = store.path(entry.name)
        assert store.holds(entry.name)
        assert (entry.size, entry.v1, entry.v2) == (path.stat().st_size, torrent.v1, torrent.v2)
        assert entry.name == f"{pieces_root(path).hex()}.safetensors"
        with path.open("rb") as file:
            read_canonical(file, entry.size, entry.name)
        kept = (published.folder / "blocks" / f"{entry.name}.torrent").read_bytes()
        assert Torrent.from_bytes(kept) == torrent
    assert published.folder == store.model_folder(published.model.v2) / "A-model"
    assert Manifest.from_bytes((published.folder / "manifest.msgpack").read_bytes()) == published.manifest
    assert {"/".join(file.path) for file in published.model.files} == set(listing(published.folder))
    assert store.load_torrent(published.model.v2) == published.model.to_bytes()
    assert not (store.data / "publishing").exists()
    config = json.loads((published.folder / "config.json").read_text())
    assert "transformers_version" not in config
    assert AutoConfig.from_pretrained(published.folder).to_dict().items() >= config.items()


def test_the_manifest_says_what_the_files_hold(tmp_path: Path, store: Store) -> None:
    save_llama(tmp_path / "checkpoint", tied=True)
    manifest = publish(Recipe("m", tmp_path / "checkpoint", layers_per_block=2), store).manifest
    for entry in manifest.files:
        with store.path(entry.name).open("rb") as file:
            assert read_canonical(file, entry.size, entry.name) == manifest.layouts[entry.layout]
    assert len(manifest.layouts) == 4  # the embedding, two layers, the last layer alone, the norm before the head
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_a_layer_file_knows_nothing_of_its_model(folder: Path, store: Store) -> None:
    published = publish(Recipe("m", folder), store)
    block = published.manifest.blocks[3]
    (used,) = block.files
    with store.path(published.manifest.files[used.file].name).open("rb") as file:
        header = file.read(2000)
    assert block.layers == Span(2, 2)
    assert used.names == (("", "model.layers.2."),)
    assert b'{"input_layernorm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}' in header
    assert b"model" not in header
    assert b"metadata" not in header


def test_other_folders_and_shardings_give_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    expected = published_in(tmp_path / "one", Recipe("m", folder))
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert published_in(tmp_path / "two", Recipe("m", tmp_path / "elsewhere")) == expected
    save_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert published_in(tmp_path / "three", Recipe("m", tmp_path / "sharded")) == expected
    assert published_in(tmp_path / "four", Recipe("other", folder))[1:] == expected[1:]


def test_tied_embeddings_exist_once(tmp_path: Path, store: Store) -> None:
    model = save_llama(tmp_path / "tied", tied=True)
    published = publish(Recipe("m", tmp_path / "tied"), store)
    stem, head = published.manifest.blocks[0], published.manifest.blocks[-1]
    assert len(published.manifest.files) == 1 + LAYERS + 1
    assert set(stem.files) < set(head.files)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert same_tensors(read_back(published, store), expected)


def test_a_stored_alias_of_a_tied_weight_is_left_out(tmp_path: Path, store: Store) -> None:
    save_llama(tmp_path / "tied", tied=True)
    path = tmp_path / "tied" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    clean = publish(Recipe("m", tmp_path / "tied"), store)
    embeddings = tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file({**tensors, "lm_head.weight": embeddings.clone(), "junk": torch.ones(1)}, path)
    published = publish(Recipe("m", tmp_path / "tied"), store)
    assert published.left_out == ("junk", "lm_head.weight")
    assert published.magnet == clean.magnet
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file({**tensors, "lm_head.weight": embeddings}, path)
    assert publish(Recipe("m", tmp_path / "tied"), store).magnet == clean.magnet


def test_several_layers_per_block(tmp_path: Path, store: Store) -> None:
    model = save_llama(tmp_path / "checkpoint")
    published = publish(Recipe("m", tmp_path / "checkpoint", layers_per_block=2), store)
    spans = [block.layers for block in published.manifest.blocks]
    assert spans == [None, Span(0, 1), Span(2, 3), Span(4, 4), None]
    names = published.manifest.blocks[2].files[0].names
    assert names == (("0.", "model.layers.2."), ("1.", "model.layers.3."))
    assert published.manifest.block_label(2) == "block 2 (layers 2-3)"
    assert same_tensors(read_back(published, store), model.state_dict())


def test_equal_layers_are_one_file(tmp_path: Path, store: Store) -> None:
    model = save_llama(tmp_path / "checkpoint")
    model.model.layers[3].load_state_dict(model.model.layers[1].state_dict())
    model.save_pretrained(tmp_path / "checkpoint")
    published = publish(Recipe("m", tmp_path / "checkpoint"), store)
    assert published.manifest.blocks[2].files[0].file == published.manifest.blocks[4].files[0].file
    assert len(published.torrents) == len(published.manifest.files) == LAYERS + 1
    assert same_tensors(read_back(published, store), model.state_dict())


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.bfloat16), ("F32", torch.float32), ("F16", torch.float16)])
def test_precision(asked: str | None, dtype: torch.dtype, tmp_path: Path, store: Store) -> None:
    model = save_llama(tmp_path / "checkpoint", dtype=torch.bfloat16)
    published = publish(Recipe("m", tmp_path / "checkpoint", dtype=asked), store)
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert same_tensors(read_back(published, store), expected)
    assert published.manifest.dtype == (asked or "BF16")
    assert json.loads((published.folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_small_files_travel(folder: Path, store: Store) -> None:
    (folder / "tokenizer.json").write_text(TOKENIZER + "   \n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/me", "z": 1, "a": [{"b": 2}]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "special_tokens_map.json").write_bytes(b"")
    (folder / "notes.txt").write_text("not for others")
    (folder / "optimizer.bin").write_text("nor this")
    found = listing(publish(Recipe("m", folder), store).folder)
    assert found["tokenizer.json"] == (TOKENIZER + "   \n").encode()
    assert found["tokenizer_config.json"] == b'{\n  "a": [\n    {\n      "b": 2\n    }\n  ],\n  "z": 1\n}\n'
    names = {name for name in found if "/" not in name}
    assert names == {
        "LICENSE.txt", "chat_template.jinja", "config.json", "generation_config.json", "manifest.msgpack",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


# --- a second run


def test_a_second_run_recognises_the_first(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("m", folder)
    assert recognise(recipe, store) is None
    first = publish(recipe, store)
    assert recognise(recipe, store) == first
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "Checkpoint", lambda path: pytest.fail("the checkpoint was opened"))
        assert publish(recipe, store) == first
        with pytest.raises(pytest.fail.Exception):
            publish(Recipe("m", folder, layers_per_block=2), store)
    assert publish(Recipe("m", folder, layers_per_block=2), store).magnet != first.magnet


def damage_block(store: Store, published: Published) -> None:
    path = store.path(published.manifest.files[2].name)
    path.write_bytes(bytes(path.stat().st_size))


def lose_block(store: Store, published: Published) -> None:
    store.path(published.manifest.files[0].name).unlink()


def damage_payload(store: Store, published: Published) -> None:
    (published.folder / "config.json").write_text("{}")


def lose_payload(store: Store, published: Published) -> None:
    shutil.rmtree(published.folder)


def damage_torrent(store: Store, published: Published) -> None:
    (store.torrents / f"{published.model.v2.hex()}.torrent").write_bytes(b"de")


def touch_source(store: Store, published: Published) -> None:
    os.utime(store.data.parent / "checkpoint" / "model.safetensors", (1, 1))


@pytest.mark.parametrize(
    "harm", [damage_block, lose_block, damage_payload, lose_payload, damage_torrent, touch_source]
)  # fmt: skip
def test_a_second_run_mends_what_is_missing(harm: object, folder: Path, store: Store, tmp_path: Path) -> None:
    first = publish(Recipe("m", folder), store)
    before = listing(store.blocks) | listing(store.models)
    harm(store, first)  # type: ignore[operator]
    steps: list[object] = []
    assert publish(Recipe("m", folder), store, lambda *step: steps.append(step)) == first
    assert len(steps) > 10
    assert listing(store.blocks) | listing(store.models) == before
    assert all(store.verify(file.name) for file in first.manifest.files)


# --- what goes wrong


def refused(recipe: Recipe, store: Store, error: type[Exception], match: str) -> None:
    """It is refused with one sentence, and leaves nothing behind."""
    before = listing(store.data)
    with pytest.raises(error, match=match) as caught:
        publish(recipe, store)
    assert "\n" not in str(caught.value)
    assert listing(store.data) == before
    assert not (store.data / "publishing").exists()


def test_truncated(folder: Path, store: Store) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(Recipe("m", folder), store, ArtifactError, r"model\.safetensors is not a usable.*fetch")


def test_cut_short_while_it_is_read(folder: Path, store: Store) -> None:
    path = folder / "model.safetensors"
    before = listing(store.data)

    def cut(done: int, total: int, what: str) -> None:
        if done > total // 2:
            os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(ArtifactError, match=r"model\.safetensors ends before"):
        publish(Recipe("m", folder), store, cut)
    assert listing(store.data) == before


def test_missing_shard(tmp_path: Path, store: Store) -> None:
    save_llama(tmp_path / "sharded", max_shard_size="20KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    refused(Recipe("m", tmp_path / "sharded"), store, ArtifactError, f"{shard.name} is missing")


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_unusable_index(index: str, folder: Path, store: Store) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(Recipe("m", folder), store, ArtifactError, "not a usable index")


def test_index_and_shard_disagree(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lost": "other.safetensors"}}')
    refused(Recipe("m", folder), store, ArtifactError, r"other\.safetensors lacks tensor lost")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**safetensors.torch.load_file(path), **changes}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_missing_tensor(folder: Path, store: Store) -> None:
    rewrite(folder, **{"model.layers.2.mlp.up_proj.weight": None})
    refused(Recipe("m", folder), store, ArtifactError, r"lacks tensor model\.layers\.2\.mlp\.up_proj\.weight")


def test_other_names(folder: Path, store: Store) -> None:
    rewrite(folder, **{"model.norm.weight": None, "last_norm.weight": torch.ones(32)})
    sentence = r"last_norm\.weight, where the model has model\.norm\.weight"
    refused(Recipe("m", folder), store, UnsupportedModelError, sentence)


def test_names_without_the_models_prefix(folder: Path, store: Store) -> None:
    """As checkpoints of a model without its head have them; what is published is the same."""
    whole = publish(Recipe("m", folder), store)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(bare, folder / "model.safetensors")
    assert publish(Recipe("m", folder), store).magnet == whole.magnet


def test_shapes_disagree(folder: Path, store: Store) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(16)})
    refused(Recipe("m", folder), store, ArtifactError, r"model\.norm\.weight of shape \[16\].*\[32\]")


def test_pickle(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(Recipe("m", folder), store, ArtifactError, r"pytorch_model\.bin is a pickle.*convert")


def test_no_weights(folder: Path, store: Store) -> None:
    (folder / "model.safetensors").unlink()
    refused(Recipe("m", folder), store, ArtifactError, "neither")


@pytest.mark.parametrize("config", ["", "[]", "{", "[" * 100_000])
def test_broken_config(config: str, folder: Path, store: Store) -> None:
    (folder / "config.json").write_text(config)
    refused(Recipe("m", folder), store, ArtifactError, r"config\.json is not a JSON object")


def test_no_config(folder: Path, store: Store) -> None:
    (folder / "config.json").unlink()
    refused(Recipe("m", folder), store, ArtifactError, r"no config\.json")


@pytest.mark.parametrize("extra", [{"model_type": "no-such-thing"}, {"quantization_config": {"quant_method": "fp8"}}])
def test_unsupported(extra: dict[str, object], folder: Path, store: Store) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    refused(Recipe("m", folder), store, UnsupportedModelError, ".")


def test_no_source(tmp_path: Path, store: Store) -> None:
    refused(Recipe("m", tmp_path / "nowhere"), store, ConfigError, "there is no folder")
    refused(Recipe("m", gguf=tmp_path / "nowhere.gguf"), store, ConfigError, "there is no file")
    refused(Recipe("m"), store, ConfigError, "no source")


def test_disk_too_small(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(Recipe("m", folder), store, StorageError, "disk full")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_fails_half_way(code: int, folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = publishing.write_block
    calls = iter(range(100))

    def write_block(*arguments: object) -> Torrent:
        if next(calls) == 4:
            raise OSError(code, os.strerror(code))
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(publishing, "write_block", write_block)
    refused(Recipe("m", folder), store, StorageError, "disk full" if code == errno.ENOSPC else "error")
