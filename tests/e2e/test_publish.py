"""``torrentlm publish`` and ``convert`` as a person types them: the magnet, a kill in the middle, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.e2e import checkpoint
from tests.e2e.processes import TORRENTLM, Seed, Terminal, run
from torrentlm.cli.demo import find_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make(tmp_path_factory.mktemp("made") / "checkpoint")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(f'[model]\nname = "Tiny"\n\n[model.source]\nfolder = "{folder}"\n\n[node]\ndata = "data"\n')
    return path


def contents(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


def test_it_prints_the_magnet_and_seed_knows_it(recipe: Path, tmp_path: Path) -> None:
    done = run("publish", str(recipe))
    assert (done.returncode, done.stderr) == (0, "")
    magnet = done.stdout.strip()
    assert magnet.startswith("magnet:?xt=urn:btih:")
    again = run("publish", str(recipe), "--json")
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert [event["event"] for event in events] == ["published"]
    assert (events[0]["magnet"], events[0]["name"], events[0]["left_out"]) == (magnet, "Tiny", [])
    assert events[0]["size"] == sum(path.stat().st_size for path in (tmp_path / "data" / "blocks").iterdir())
    with Seed(str(recipe), tmp_path / "data", "--blocks", "none") as seed:
        assert seed.wait_for("published")["magnet"] == magnet
        busy = run("publish", str(recipe))
        assert (busy.returncode, busy.stdout) == (1, "")
        assert "is in use by another node" in busy.stderr


def test_inspect_shows_what_nobody_seeds_yet(recipe: Path, tmp_path: Path) -> None:
    published = run("publish", str(recipe), "--data", str(tmp_path / "data"), "--json")
    magnet = json.loads(published.stdout)["magnet"]
    alone = ("--data", str(tmp_path / "data"), "--host", "127.0.0.1", "--dht-bootstrap", "none", "--json")
    for what in (str(recipe), magnet):
        found = json.loads(run("inspect", what, *alone, timeout=25).stdout)
        assert found["magnet"] == magnet and found["peers_known"] == 0
        assert found["proof"]["source"] == "this node"


def test_a_magnet_is_published_already() -> None:
    done = run("publish", "magnet:?xt=urn:btih:" + "ab" * 20)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("give torrentlm publish a model.toml.")


def test_a_terminal_sees_bytes_rate_and_time_left(tmp_path: Path) -> None:
    terminal = Terminal(*TORRENTLM, "publish", str(find_recipe()), "--data", str(tmp_path / "data"))
    try:
        shown = terminal.wait_for(" left")
        assert " MB of 538 MB" in shown
        assert "B/s" in shown
        terminal.interrupt()
        assert terminal.wait() == 130
        assert "the same command goes on from here" in terminal.output
        assert "Traceback" not in terminal.output
    finally:
        terminal.close()


def test_a_kill_in_the_middle_costs_the_rest_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = [*TORRENTLM, "publish", str(find_recipe()), "--data", str(data), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["done"] > event["total"] / 2:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    staged = {path.name: path.stat() for path in (data / "publishing").glob("*.safetensors")}
    assert len(staged) > 5
    assert not contents(data / "blocks") | contents(data / "models") | contents(data / "torrents")
    done = run("publish", str(find_recipe()), "--data", str(data), timeout=200)
    assert done.stdout.strip() == find_recipe().with_suffix(".magnet").read_text().strip()
    for name, status in staged.items():
        now = (data / "blocks" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert not (data / "publishing").exists()


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))


def lose_a_shard(folder: Path) -> None:
    names = sorted(safetensors.torch.load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors") | {names[-1]: "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def name_another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "says", "allowed"),
    [
        (truncate, "model.safetensors is not a usable safetensors file", None),
        (reshape, "of shape [64, 96], but config.json asks for [64, 100]", None),
        (lose_a_shard, "two.safetensors is missing, although", None),
        (name_another_architecture, "does not know the architecture 'abacus'", None),
        (lose_the_tokenizer, "has no tokenizer", "--no-tokenizer"),
        (spoil, "tensor model.norm.weight of", "--allow-nan"),
    ],
)
def test_bad_input(harm: Callable[[Path], None], says: str, allowed: str | None, folder: Path, recipe: Path) -> None:
    harm(folder)
    done = run("publish", str(recipe))
    assert (done.returncode, done.stdout) == (1, "")
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("torrentlm: ")
    assert says in sentence
    assert ";" in sentence  # what to do
    left = {path for path in contents(recipe.parent / "data") if str(path) not in ("format", "lock")}
    assert left == set()
    if allowed:
        assert allowed in sentence
        done = run("publish", str(recipe), allowed)
        assert done.returncode == 0
        assert ("model.norm.weight" in done.stderr) == (allowed == "--allow-nan")


def test_pickles_are_refused_with_a_command_that_works(made: Path, folder: Path, recipe: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    done = run("publish", str(recipe))
    assert done.returncode == 1
    assert f"{folder / 'pytorch_model.bin'} is a pickle" in done.stderr
    command = done.stderr.strip().partition("torrentlm convert ")[2]
    done = run("convert", command)
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "model.safetensors"))
    plain = recipe.with_name("plain.toml")
    plain.write_text(recipe.read_text().replace(str(folder), str(made)))
    assert run("publish", str(recipe)).stdout == run("publish", str(plain)).stdout != ""
    again = run("convert", command)
    assert again.returncode == 1
    assert "has safetensors already" in again.stderr


def test_consume_leaves_one_copy(folder: Path, recipe: Path) -> None:
    done = run("publish", str(recipe), "--consume")
    assert done.returncode == 0
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "config.json").exists()
    assert run("publish", str(recipe)).stdout == done.stdout
    other = run("publish", str(find_recipe()), "--consume", "--data", str(recipe.parent / "data"))
    assert other.returncode == 1
    assert "--consume is for a folder" in other.stderr
