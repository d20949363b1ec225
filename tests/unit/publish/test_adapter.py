"""An adapter as peft saves it becomes small torrents that depend on nothing but its values and its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.processes import run
from tests.peft_adapters import TARGETS, make_adapter
from tests.unit.publish.models import LAYERS, listing, save_llama
from torrentlm.config import AdapterRecipe, Recipe
from torrentlm.errors import ArtifactError, ConfigError, TorrentLMError, UnsupportedModelError
from torrentlm.manifest.adapter import AdapterManifest
from torrentlm.manifest.canonical import read_canonical
from torrentlm.manifest.torrent import Torrent, pieces_root
from torrentlm.publish.adapter import PublishedAdapter, publish_adapter
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_folder(base_folder: Path) -> Path:
    return make_adapter(base_folder, base_folder.parent / "adapter")


@pytest.fixture
def base(base_folder: Path, store: Store) -> Published:
    return publish(Recipe("base", base_folder), store)


def published(folder: Path, base: Published, store: Store, name: str = "An adapter!") -> PublishedAdapter:
    return publish_adapter(AdapterRecipe(name, folder), base.magnet, base.manifest, store)


def test_every_change_arrives_under_the_models_names(adapter_folder: Path, base: Published, store: Store) -> None:
    found = published(adapter_folder, base, store)
    manifest = AdapterManifest.from_bytes((found.folder / "adapter.msgpack").read_bytes())
    assert manifest == found.manifest
    assert (manifest.name, manifest.base.v2, found.torrent.name) == ("An adapter!", base.model.v2, "An-adapter")
    assert manifest.touched == frozenset(range(1, LAYERS + 1))
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    arrived: dict[str, torch.Tensor] = {}
    for entry in manifest.blocks:
        file = manifest.files[entry.used.file]
        for name, tensor in load_file(store.path(file.name)).items():
            arrived["base_model.model." + entry.used.full_name(name)] = tensor
        layer = f"model.layers.{entry.block - 1}."
        scalings = manifest.scalings(entry)
        assert set(scalings) == {f"{layer}{part}.{name}" for part, name in MODULES}
        assert set(scalings.values()) == {2.0}
    assert arrived.keys() == saved.keys() and all(torch.equal(arrived[name], saved[name]) for name in saved)


MODULES = (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj"))


def test_files_are_canonical_and_named_by_their_content(adapter_folder: Path, base: Published, store: Store) -> None:
    found = published(adapter_folder, base, store)
    for file in found.manifest.files:
        path = store.path(file.name)
        assert store.holds(file.name) and pieces_root(path).hex() == file.name.partition(".")[0]
        with path.open("rb") as content:
            names = [spec.name for spec in read_canonical(content, file.size, file.name).specs]
        assert not any(name.startswith("model.") or name[0].isdigit() for name in names)
        torrent = Torrent.from_bytes((found.folder / "blocks" / f"{file.name}.torrent").read_bytes())
        assert (torrent.v1, torrent.v2, torrent.size) == (file.v1, file.v2, file.size)
    assert store.load_torrent(found.torrent.v2) == found.torrent.to_bytes()


def test_the_magnet_depends_on_values_alone(
    adapter_folder: Path, base: Published, store: Store, tmp_path: Path
) -> None:
    first = published(adapter_folder, base, store)
    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings |= {"peft_version": "9", "base_model_name_or_path": "/elsewhere", "lora_dropout": 0.5, "new_key": None}
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), copy / "adapter_model.safetensors", metadata={"note": "mine"})
    with Store(tmp_path / "elsewhere") as other:
        assert published(copy, base, other).magnet == first.magnet
    assert published(copy, base, store, "Another").magnet != first.magnet


def test_adapters_that_agree_in_a_layer_share_its_file(
    adapter_folder: Path, base: Published, store: Store, tmp_path: Path
) -> None:
    first = published(adapter_folder, base, store)
    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    tensors = load_file(copy / "adapter_model.safetensors")
    changed = next(name for name in tensors if ".layers.3." in name)
    save_file(tensors | {changed: tensors[changed] + 1}, copy / "adapter_model.safetensors")
    second = published(copy, base, store)
    names = [[file.name for file in found.manifest.files] for found in (first, second)]
    assert [one == other for one, other in zip(*names, strict=True)] == [layer != 3 for layer in range(LAYERS)]


def test_several_layers_in_a_block(adapter_folder: Path, base_folder: Path, store: Store) -> None:
    base = publish(Recipe("base", base_folder, layers_per_block=2), store)
    manifest = published(adapter_folder, base, store).manifest
    assert [entry.block for entry in manifest.blocks] == [1, 2, 3]
    assert len(manifest.within(Span(2, 3))) == 2
    modules = [name for entry in manifest.blocks for name in manifest.scalings(entry)]
    assert sorted(modules) == sorted(
        f"model.layers.{layer}.{part}.{name}" for layer in range(LAYERS) for part, name in MODULES
    )


def test_ranks_and_scalings_of_their_own(base_folder: Path, base: Published, store: Store, tmp_path: Path) -> None:
    folder = make_adapter(
        base_folder,
        tmp_path / "adapter",
        use_rslora=True,
        rank_pattern={"q_proj": 9, r"layers\.2\.mlp\.down_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 3},
        target_modules=[*TARGETS, "lm_head"],
    )
    manifest = published(folder, base, store).manifest
    scalings = {name: value for entry in manifest.blocks for name, value in manifest.scalings(entry).items()}
    assert manifest.touched == frozenset(range(1, LAYERS + 2))
    assert scalings["model.layers.0.self_attn.q_proj"] == 8 / 3
    assert scalings["model.layers.2.mlp.down_proj"] == 8 / 2**0.5
    assert scalings["model.layers.1.self_attn.v_proj"] == 1.5
    assert scalings["lm_head"] == scalings["model.layers.2.self_attn.v_proj"] == 4


def edited(folder: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "DoRA"),
    ({"peft_type": "LOHA"}, "only LoRA"),
    ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ({"bias": "all"}, 'bias="none"'),
    ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"something_new": 1}, "something_new"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ({"r": 5}, "rank 5"),
    ({"lora_alpha": "much"}, "must be numbers"),
    ({"rank_pattern": {"(": 3}}, "pattern"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSED)
def test_what_is_more_than_a_lora_is_refused(
    settings: dict[str, Any], says: str, adapter_folder: Path, base: Published, store: Store, tmp_path: Path
) -> None:
    refused(edited(adapter_folder, tmp_path / "adapter", **settings), says, base, store)


def refused(
    folder: Path, says: str, base: Published, store: Store, kind: type[TorrentLMError] = TorrentLMError
) -> None:
    before = listing(store.data)
    with pytest.raises(kind) as error:
        published(folder, base, store)
    sentence = str(error.value)
    assert says in sentence and "\n" not in sentence and len(sentence) < 400
    assert listing(store.data) == before


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS: list[tuple[Edit, str]] = [
    (lambda found: {}, "holds no tensors"),
    (lambda found: {name: tensor for name, tensor in found.items() if name != A}, "only one of A and B"),
    (lambda found: found | {A: found[A] / 0}, "NaN or infinite"),
    (lambda found: found | {A: found[A][:, :-1].contiguous()}, "[32, 31]"),
    (lambda found: found | {A.replace("layers.0", "layers.7"): found[A]}, "only one of A and B"),
    (lambda found: {name.replace("layers.0", "layers.7"): tensor for name, tensor in found.items()}, "does not have"),
    (lambda found: found | {A.replace("lora_A.weight", "lora_magnitude_vector"): found[A]}, "DoRA"),
    (lambda found: found | {"base_model.model.model.embed_tokens.lora_embedding_A": found[A]}, "embeddings"),
    (lambda found: found | {"base_model.model.lm_head.weight": found[A]}, "whole weights"),
    (lambda found: found | {"base_model.model.lm_head.base_layer.weight": found[A]}, "save_embedding_layers=False"),
    (lambda found: found | {A.replace("lora_A.weight", "lora_B.bias"): found[A]}, "biases"),
    (lambda found: found | {A.removeprefix("base_model.model."): found[A] + 1}, "two tensors"),
]


@pytest.mark.parametrize(("edit", "says"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    edit: Edit, says: str, adapter_folder: Path, base: Published, store: Store, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in edit(load_file(path)).items()}, path)
    refused(folder, says, base, store)


def test_folders_that_are_none(adapter_folder: Path, base: Published, store: Store, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no folder", base, store, ConfigError)
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    refused(folder, "bytes where its header", base, store, ArtifactError)
    weights.unlink()
    refused(folder, "has no adapter_model.safetensors", base, store, ArtifactError)
    (folder / "adapter_model.bin").write_bytes(content)
    refused(folder, "is a pickle", base, store, ArtifactError)
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "not a JSON object", base, store, ArtifactError)


def test_an_adapter_of_another_model_is_refused(adapter_folder: Path, store: Store, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "other")
    other = publish(Recipe("other", tmp_path / "other", tokenizer=False), store)
    refused(adapter_folder, "does not have", other, store, ArtifactError)


def test_a_tied_head_is_refused(store: Store, tmp_path: Path) -> None:
    save_llama(tmp_path / "tied", tied=True)
    folder = make_adapter(tmp_path / "tied", tmp_path / "adapter", target_modules=["lm_head"])
    refused(folder, "lm_head", publish(Recipe("tied", tmp_path / "tied", tokenizer=False), store), store)


def test_embeddings_are_refused(base_folder: Path, base: Published, store: Store, tmp_path: Path) -> None:
    folder = make_adapter(base_folder, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    refused(folder, "changes embeddings", base, store, UnsupportedModelError)


def test_the_command_publishes_adapters_with_the_model_or_for_one_that_is_there(
    adapter_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    tables = f'[[adapter]]\nname = "a"\nfolder = "{adapter_folder}"\n'
    model, joining = tmp_path / "model.toml", tmp_path / "joining.toml"
    model.write_text(f'[model]\nname = "base"\ntokenizer = false\n[model.source]\nfolder = "{base_folder}"\n' + tables)
    here = ("--data", str(tmp_path / "data"))
    done = run("publish", str(model), *here)
    magnet, adapter = done.stdout.splitlines()
    joining.write_text(f'magnet = "{magnet}"\n' + tables)
    again = run("publish", str(joining), *here, "--json")
    event = json.loads(again.stdout)
    assert (event["event"], event["name"], event["magnet"]) == ("adapter", "a", adapter)
    assert event["blocks"] == list(range(1, LAYERS + 1))
    elsewhere = run("publish", str(joining), "--data", str(tmp_path / "elsewhere"))
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "") and "torrentlm seed" in elsewhere.stderr
