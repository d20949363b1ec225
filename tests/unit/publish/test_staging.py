"""A run that was killed or interrupted is taken up where it was, and never half believed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.publish.models import LAYERS, listing, save_llama
from torrentlm.config import Recipe
from torrentlm.publish import publish as publishing
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.swarm.store import Store

FILES = LAYERS + 2
HANGS = """
import sys, time
from pathlib import Path
from torrentlm.config import Recipe
from torrentlm.publish.publish import publish
from torrentlm.swarm.store import Store

def progress(done, total, what):
    if what == sys.argv[3]:
        print("there", flush=True)
        time.sleep(600)

with Store(Path(sys.argv[2])) as store:
    publish(Recipe("m", Path(sys.argv[1])), store, progress)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the block files that are really written from now on."""
    original, names = publishing.write_block, []

    def write_block(*arguments: object) -> object:
        torrent = original(*arguments)  # type: ignore[arg-type]
        names.append(torrent.name)
        return torrent

    monkeypatch.setattr(publishing, "write_block", write_block)
    return names


@pytest.fixture
def expected(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run leaves in the store."""
    with Store(tmp_path / "undisturbed") as store:
        publish(Recipe("m", folder), store)
        return left_in(store)


@pytest.fixture
def store(tmp_path: Path, folder: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


def left_in(store: Store) -> dict[str, bytes]:
    return listing(store.blocks) | listing(store.models) | listing(store.torrents)


def interrupted(folder: Path, store: Store, at: str, **recipe: object) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(Recipe("m", folder, **recipe), store, stop)  # type: ignore[arg-type]


def staged(store: Store) -> list[Path]:
    return sorted((store.data / "publishing").glob("*.safetensors"))


def test_a_killed_process_is_taken_up(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], written: list[str]
) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "-c", HANGS, str(folder), str(data), "layers 2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    complete = {path.name for path in (data / "publishing").glob("*.safetensors")}
    assert len(complete) == 3  # the stem and two layers
    assert (data / "publishing" / "block.part").exists()
    with Store(data) as store:
        assert left_in(store) == {}
        steps: list[tuple[int, int, str]] = []
        published = publish(Recipe("m", folder), store, lambda *step: steps.append(step))
        assert left_in(store) == expected
    assert len(written) == FILES - 3
    assert not complete & set(written)
    assert steps[-1][0] == steps[-1][1] == published.manifest.size
    assert not (data / "publishing").exists()


def test_an_interrupted_run_is_taken_up(
    folder: Path, store: Store, expected: dict[str, bytes], written: list[str]
) -> None:
    interrupted(folder, store, "layers 3")
    assert len(staged(store)) == 4
    assert not (store.data / "publishing" / "block.part").exists()
    assert left_in(store) == {}
    written.clear()
    publish(Recipe("m", folder), store)
    assert len(written) == FILES - 4
    assert left_in(store) == expected
    assert not (store.data / "publishing").exists()


def test_an_interrupted_move_is_taken_up(
    folder: Path, store: Store, expected: dict[str, bytes], written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = store.mark_verified, iter(range(100))

    def mark_verified(name: str) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        original(name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "mark_verified", mark_verified)
        publish(Recipe("m", folder), store)
    assert len(list(store.blocks.iterdir())) == 4
    assert not list(store.models.iterdir())
    written.clear()
    publish(Recipe("m", folder), store)
    assert written == []
    assert left_in(store) == expected
    assert all(store.holds(path.name) for path in store.blocks.iterdir())


def test_what_the_store_has_is_not_written_again(folder: Path, store: Store, written: list[str]) -> None:
    publish(Recipe("other name", folder), store)
    interrupted(folder, store, "layers 3")
    assert staged(store) == []
    written.clear()
    publish(Recipe("m", folder), store)
    assert len(written) == FILES - 4


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


def lose_torrent(path: Path) -> None:
    path.with_suffix(".torrent").unlink()


def swap_torrent(path: Path) -> None:
    others = [each for each in path.parent.glob("*.torrent") if each.stem != path.stem]
    shutil.copy(others[0], path.with_suffix(".torrent"))


@pytest.mark.parametrize("harm", [touch, damage, lose, lose_torrent, swap_torrent])
def test_a_staged_file_is_believed_only_untouched(
    harm: object, folder: Path, store: Store, expected: dict[str, bytes], written: list[str]
) -> None:
    interrupted(folder, store, "layers 3")
    victim = staged(store)[1]
    harm(victim)  # type: ignore[operator]
    written.clear()
    publish(Recipe("m", folder), store)
    assert victim.name in written
    assert len(written) == FILES - 3
    assert left_in(store) == expected


@pytest.mark.parametrize("line", ['["abc', "[]", "7", '["a", "../../etc/passwd", [1, 2]]', "x" * 10_000, "ü"])
def test_a_damaged_journal_costs_work_only(
    line: str, folder: Path, store: Store, expected: dict[str, bytes], written: list[str]
) -> None:
    interrupted(folder, store, "layers 3")
    with (store.data / "publishing" / "journal").open("a") as journal:
        journal.write(line)
    written.clear()
    publish(Recipe("m", folder), store)
    assert len(written) == (FILES if line == "ü" else FILES - 4)
    assert left_in(store) == expected


def test_another_source_or_recipe_starts_anew(folder: Path, store: Store, written: list[str]) -> None:
    def published(**recipe: object) -> Published:
        written.clear()
        return publish(Recipe("m", folder, **recipe), store)  # type: ignore[arg-type]

    interrupted(folder, store, "layers 3")
    published(layers_per_block=2)
    assert len(written) == 5
    interrupted(folder, store, "layers 3", dtype="F16")
    touch(folder / "model.safetensors")
    published(dtype="F16")
    assert len(written) == FILES


def test_what_was_let_pass_is_looked_at_again(folder: Path, store: Store, written: list[str]) -> None:
    interrupted(folder, store, "layers 3", allow_nan=True)
    written.clear()
    publish(Recipe("m", folder), store)
    assert len(written) == FILES
