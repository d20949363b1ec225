"""`inspect FILE.torrent`: without any network, from what lies on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torrentlm.cli import commands as cli
from torrentlm.cli.inspect import inspect_torrent
from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.manifest.torrent import Hasher, multi_file, piece_length, single_file

TENSORS = (TensorSpec("mlp.up.weight", "F32", (3, 5)), TensorSpec("norm.weight", "F16", ()))


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A block file and its torrent, where a data folder has them; the torrent's path."""
    content = bytearray()
    write(layout(TENSORS), lambda name: [bytes(60 if name.startswith("mlp") else 2)], content.extend)
    hasher = Hasher(piece_length(len(content)))
    hasher.update(content)
    hashes = hasher.finish()
    name = f"{hashes.root.hex()}.safetensors"
    torrent = tmp_path / "models" / "m" / "Tiny" / "blocks" / f"{name}.torrent"
    for path in (torrent, tmp_path / "blocks" / name):
        path.parent.mkdir(parents=True)
    (tmp_path / "blocks" / name).write_bytes(content)
    torrent.write_bytes(single_file(name, hashes, piece_length(len(content))).to_bytes())
    return torrent


def test_a_block_with_its_tensors(block: Path):
    found = inspect_torrent(block)
    assert found["name"] == block.stem and found["size"] == found["files"][0]["size"]
    assert (len(found["v1"]), len(found["v2"])) == (40, 64)
    assert found["magnet"].startswith(f"magnet:?xt=urn:btih:{found['v1']}&xt=urn:btmh:1220{found['v2']}")
    assert found["tensors"] == [
        {"name": "mlp.up.weight", "dtype": "F32", "shape": [3, 5]},
        {"name": "norm.weight", "dtype": "F16", "shape": []},
    ]


def test_a_block_that_is_not_here_has_no_tensors(block: Path):
    (block.parents[4] / "blocks" / block.stem).unlink()
    assert "tensors" not in inspect_torrent(block)


def test_a_model_torrent_lists_its_files(tmp_path: Path):
    path = tmp_path / "model.torrent"
    path.write_bytes(multi_file("Tiny", {"config.json": b"{}", "blocks/a.torrent": b"x" * 100}).to_bytes())
    found = inspect_torrent(path)
    assert [(file["path"], file["size"]) for file in found["files"]] == [("blocks/a.torrent", 100), ("config.json", 2)]


def test_for_people_and_for_scripts(block: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["inspect", str(block), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_torrent(block)
    assert cli.run(["inspect", str(block)]) == 0
    shown = capsys.readouterr().out
    for part in (inspect_torrent(block)["magnet"], "mlp.up.weight", "3x5", "scalar", "F16"):
        assert part in shown


@pytest.mark.parametrize("content", [b"", b"de", b"d4:infod4:name1:xee", b"\xff" * 100])
def test_other_files_are_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "x.torrent"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.torrent"):
        inspect_torrent(path)
