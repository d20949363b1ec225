"""`inspect FILE.torrent`: without any network, from what lies on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torrentlm.cli import commands as cli
from torrentlm.cli.inspect import inspect_torrent
from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import TensorSpec, layout, write
from torrentlm.manifest.manifest import FILE_NAME, BlockEntry, BlockFile, FileEntry, Manifest, Side
from torrentlm.manifest.torrent import Hasher, Torrent, multi_file, piece_length, single_file
from torrentlm.records import Span

TENSORS = (TensorSpec("mlp.up.weight", "F32", (3, 5)), TensorSpec("norm.weight", "F16", ()))


@pytest.fixture
def block(tmp_path: Path) -> Path:
    """A block's torrent in a model's folder, below the manifest; the file itself is elsewhere."""
    content = bytearray()
    write(layout(TENSORS), lambda name: [bytes(60 if name.startswith("mlp") else 2)], content.extend)
    hasher = Hasher(piece_length(len(content)))
    hasher.update(content)
    hashes = hasher.finish()
    torrent = single_file(f"{hashes.root.hex()}.safetensors", hashes, piece_length(len(content)))
    path = tmp_path / "Tiny" / "blocks" / f"{torrent.name}.torrent"
    path.parent.mkdir(parents=True)
    path.write_bytes(torrent.to_bytes())
    (tmp_path / "Tiny" / FILE_NAME).write_bytes(manifest(torrent).to_bytes())
    (tmp_path / torrent.name).write_bytes(content)
    return path


def manifest(torrent: Torrent) -> Manifest:
    """Two equal layers are this file, and so is what the stem and the head share."""
    shared = (BlockFile(0, (("", "shared."),)),)
    layers = (BlockEntry("layers", Span(n, n), (BlockFile(0, (("", f"h.{n}."),)),)) for n in range(2))
    blocks = (BlockEntry("stem", None, shared), *layers, BlockEntry("head", None, shared))
    file = FileEntry(torrent.name, torrent.size, torrent.v1, torrent.v2, 0)
    return Manifest("Tiny", "Any", "F32", (Side("h", 2),), blocks, (file,), (layout(TENSORS),))


def test_a_block_under_a_manifest_has_its_tensors_under_the_models_names(block: Path):
    found = inspect_torrent(block)
    assert found["name"] == block.stem and found["size"] == found["files"][0]["size"]
    assert (len(found["v1"]), len(found["v2"])) == (40, 64)
    assert found["magnet"].startswith(f"magnet:?xt=urn:btih:{found['v1']}&xt=urn:btmh:1220{found['v2']}")
    assert found["tensors"] == [
        {"name": prefix + spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
        for prefix in ("shared.", "h.0.", "h.1.")
        for spec in TENSORS
    ]


@pytest.mark.parametrize("manifest", [None, b"", b"\xc0"])
def test_a_block_beside_its_file_has_the_tensors_of_the_file(block: Path, manifest: bytes | None):
    if manifest is None:
        (block.parents[1] / FILE_NAME).unlink()
    else:
        (block.parents[1] / FILE_NAME).write_bytes(manifest)
    assert "tensors" not in inspect_torrent(block)
    (block.parents[2] / block.stem).rename(block.parent / block.stem)
    assert inspect_torrent(block)["tensors"] == [
        {"name": "mlp.up.weight", "dtype": "F32", "shape": [3, 5]},
        {"name": "norm.weight", "dtype": "F16", "shape": []},
    ]


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
