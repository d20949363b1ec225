"""Two fine-tunes of one model in one store: what they share is there once, on disk and in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import checkpoint
from tests.e2e.processes import run
from torrentlm.cli import commands as cli
from torrentlm.config import Recipe
from torrentlm.holder.model import HeldModel
from torrentlm.node.compare import describe_difference
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published, stored_manifest
from torrentlm.records import Span
from torrentlm.swarm.store import Store

LAYERS = 6
CHANGED = (1, 2, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    base = checkpoint.make(folder / "base", LAYERS)
    return base, checkpoint.fine_tune(base, folder / "tuned", CHANGED)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store") / "data") as opened:
        yield opened


@pytest.fixture(scope="module")
def both(folders: tuple[Path, Path], store: Store) -> tuple[Published, Published]:
    base, tuned = (publish(Recipe(folder.name, folder), store) for folder in folders)
    return base, tuned


def difference(both: tuple[Published, Published]) -> dict[str, Any]:
    base, tuned = ((published.magnet, published.manifest) for published in both)
    return describe_difference(base, tuned)


def test_all_blocks_but_the_changed_ones_are_one_file(both: tuple[Published, Published], store: Store) -> None:
    found = difference(both)
    states = {row["layers"] or row["kind"]: row["state"] for row in found["blocks"]}
    expected = {str(layer): "differs" if layer in CHANGED else "same" for layer in range(LAYERS)}
    assert states == {"stem": "same", **expected, "head": "same"}
    assert (found["same"], found["different"]) == (LAYERS + 2 - len(CHANGED), len(CHANGED))
    for row in found["blocks"]:
        assert (row["a_v2"] == row["b_v2"]) == (row["a_v1"] == row["b_v1"]) == (row["state"] == "same")
    on_disk = sum(path.stat().st_size for path in store.blocks.iterdir())
    assert found["disk_bytes"] == on_disk == found["a_bytes"] + found["b_bytes"] - found["shared_bytes"]
    one_layer = both[0].manifest.block_files(2)[0].size
    assert found["fetch_bytes"] == len(CHANGED) * one_layer == sum(row["fetch_bytes"] for row in found["blocks"])


def test_models_cut_in_other_ways_share_what_they_can(folders: tuple[Path, Path], store: Store) -> None:
    base, pairs = (publish(Recipe("base", folders[0], layers_per_block=count), store) for count in (1, 2))
    found = difference((base, pairs))
    assert (found["same"], found["different"], found["only_in_a"], found["only_in_b"]) == (2, 0, LAYERS, LAYERS // 2)
    rows = {row["layers"]: row for row in found["blocks"] if row["kind"] == "layers"}
    assert (rows["0"]["state"], rows["0"]["b"], rows["0"]["fetch_bytes"]) == ("only in a", None, 0)
    assert (rows["0-1"]["state"], rows["0-1"]["a"]) == ("only in b", None)
    assert rows["0-1"]["fetch_bytes"] == rows["0-1"]["b_bytes"] > 0


def held(published: Published, store: Store) -> HeldModel:
    manifest = published.manifest
    paths = {file.name: store.path(file.name) for file in manifest.files}
    span = Span(0, len(manifest.blocks) - 1)
    return HeldModel(published.model.v2, manifest, published.folder, paths, span, "F32")


def test_runners_of_both_have_one_copy_in_memory(both: tuple[Published, Published], store: Store) -> None:
    models = [held(published, store) for published in both]  # at the same time
    base, tuned = (weights_of(model) for model in models)
    assert base.keys() == tuned.keys()
    changed = tuple(f"model.layers.{layer}." for layer in CHANGED)
    for name in base:
        assert (base[name] == tuned[name]) == (not name.startswith(changed)), name


def weights_of(model: HeldModel) -> dict[str, int]:
    """Where each parameter of the whole model's runner lies in memory."""
    runner = model.runner(model.span)
    return {name: weight.data_ptr() for name, weight in runner._model.named_parameters()}


def test_the_command_needs_no_network_for_models_of_the_data_folder(
    both: tuple[Published, Published], store: Store
) -> None:
    magnets = [str(published.magnet) for published in both]
    options = ("--data", str(store.data), "--dht-bootstrap", "none", "--host", "127.0.0.1")
    as_json = run("inspect", "--diff", *magnets, *options, "--json")
    assert json.loads(as_json.stdout) == difference(both), as_json.stderr
    lines = run("inspect", "--diff", *magnets, *options).stdout.splitlines()
    shown = [line.split()[1:6] for line in lines if line.split()[1:2] == ["layers"]]
    assert ["layers", "1", "2", "2", "differs"] in shown and ["layers", "0", "1", "1", "same"] in shown


@pytest.mark.parametrize("arguments", [["inspect", "--diff", "a"], ["inspect", "a", "b"], ["inspect"]])
def test_a_wrong_number_of_models_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_a_damaged_manifest_is_not_believed(both: tuple[Published, Published], store: Store) -> None:
    published = both[1]
    assert stored_manifest(published.magnet, store.data) == published.manifest
    path = published.folder / "manifest.msgpack"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x00")
    assert stored_manifest(published.magnet, store.data) is None
    path.write_bytes(content)
