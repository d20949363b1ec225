"""The demo's decisions. That it works, and leaves nobody behind, is for tests/e2e."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from rich.progress import Progress

from torrentlm.cli import demo
from torrentlm.config import Recipe, load
from torrentlm.errors import ArtifactError, ConfigError, NetworkError, StorageError


@pytest.mark.parametrize("blocks", [*range(5, 40), 128])
def test_three_share_all_blocks_evenly(blocks: int):
    spans = demo.thirds(blocks)
    assert [block for span in spans for block in span] == list(range(blocks))
    layers = [len([block for block in span if 0 < block < blocks - 1]) for span in spans]
    assert max(layers) - min(layers) <= 1


def test_the_demo_models_share():
    assert [str(span) for span in demo.thirds(32)] == ["0-10", "11-20", "21-31"]


def test_a_model_too_small_to_share():
    with pytest.raises(ArtifactError, match="4 blocks cannot be split among 3"):
        demo.thirds(4)


def test_the_demos_processes_get_no_settings_of_the_operator():
    environment = {"PATH": "/bin", "TORRENTLM_PORT": "1", "TORRENTLM_PEERS": "a:1", "TORRENTLM_THREADS": "2"}
    assert demo.private_environment(environment) == {
        "PATH": "/bin",
        "TORRENTLM_THREADS": "2",
        "TORRENTLM_LOOPBACK_ONLY": "1",
    }


def test_the_recipe_is_found_and_is_one():
    recipe = load(demo.find_recipe(), environment={}).recipe
    assert isinstance(recipe, Recipe) and recipe.dtype == "F32"


def test_the_recipe_of_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo.torrentlm, "__file__", str(tmp_path / "site-packages" / "torrentlm" / "__init__.py"))
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=r"torrents/smollm2.*missing"):
        demo.find_recipe()
    path = tmp_path / "share" / "torrentlm" / "torrents" / demo.RECIPE
    path.parent.mkdir(parents=True)
    path.touch()
    assert demo.find_recipe() == path


def test_waiting_for_ever_is_not_taken_for_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Waiting:
        left = 100

        def next_event(self, timeout: float) -> tuple[str, dict[str, str]]:
            self.left -= 1
            assert self.left, "it waits for ever"
            time.sleep(0.01)
            return "holder-1", {"event": "waiting", "why": "no peer answers"}

    monkeypatch.setattr(demo, "SILENCE_S", 0.1)
    with Progress(disable=True) as progress, pytest.raises(NetworkError, match="Nothing happened"):
        demo.Demo(Waiting(), tmp_path)._wait_for(["holder-1"], progress)


def test_one_demo_at_a_time_in_a_folder(tmp_path: Path):
    first, second = demo._alone_in(tmp_path / "new"), demo._alone_in(tmp_path / "new")
    with first, pytest.raises(StorageError, match="Another demo runs"), second:
        pass
    with demo._alone_in(tmp_path / "new"):
        pass


def test_a_folder_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "file"))), demo._alone_in(tmp_path / "file"):
        pass
