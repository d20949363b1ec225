"""The data folder: identity, records of what is complete, locks, versions, space."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torrentlm.errors import ArtifactError, StorageError
from torrentlm.manifest.torrent import pieces_root
from torrentlm.records import Endpoint
from torrentlm.swarm.store import MAX_PEERS, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as opened:
        yield opened


def put_block(store: Store, content: bytes = b"block" * 10_000) -> str:
    staged = store.data / "staged"
    staged.write_bytes(content)
    name = f"{pieces_root(staged).hex()}.safetensors"
    staged.rename(store.path(name))
    return name


def test_identity_is_made_once_and_kept_private(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        identity = store.identity()
    key = tmp_path / "identity.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    with Store(tmp_path) as store:
        assert store.identity().node == identity.node
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"ab" * 31, b"\xff\xfe"])
def test_damaged_identity_is_one_sentence(store: Store, content: bytes) -> None:
    (store.data / "identity.key").write_bytes(content)
    with pytest.raises(StorageError, match="not an identity key"):
        store.identity()


def test_two_nodes_never_share_a_folder(store: Store) -> None:
    with pytest.raises(StorageError, match="in use by another node"):
        Store(store.data)
    code = "import sys, pathlib; from torrentlm.swarm.store import Store; Store(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, store.data], capture_output=True, text=True)
    assert "FolderInUseError" in other.stderr
    assert "in use by another node" in other.stderr
    store.close()
    Store(store.data).close()


def test_another_version_is_refused_and_unlocked(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / "format").write_text("torrentlm store 99\n")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"another version \('torrentlm store 99'"):
            Store(tmp_path)


def test_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        Store(tmp_path / "file" / "data")


def test_names_are_content_addresses(store: Store) -> None:
    for name in (
        "../evil",
        "a" * 64,
        "A" * 64 + ".safetensors",
        "g" * 64 + ".safetensors",
        "a" * 64 + ".safetensors\n",
        "",
    ):
        with pytest.raises(ArtifactError, match="not the name of a block file"):
            store.path(name)


def test_verify_records_what_is_good(store: Store) -> None:
    name = put_block(store)
    assert not store.holds(name)
    assert store.verify(name)
    assert store.held() == {name}
    store.close()
    with Store(store.data) as again:
        assert again.holds(name)


@pytest.mark.parametrize("change", ["flip", "cut", "remove", "touch"])
def test_changed_file_is_no_longer_held(store: Store, change: str) -> None:
    name = put_block(store)
    store.verify(name)
    path = store.path(name)
    if change == "flip":
        data = bytearray(path.read_bytes())
        data[1234] ^= 1
        path.write_bytes(data)
    elif change == "cut":
        os.truncate(path, 100)
    elif change == "remove":
        path.unlink()
    else:
        os.utime(path, ns=(0, 1))
    assert not store.holds(name)
    assert store.verify(name) == (change == "touch")
    assert store.holds(name) == (change == "touch")


def test_silent_corruption_is_found_when_asked(store: Store) -> None:
    name = put_block(store)
    store.verify(name)
    path = store.path(name)
    stamp = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stamp, stamp))
    assert store.holds(name)
    assert not store.verify(name)
    assert not store.holds(name)


def test_marking_a_missing_file_is_an_error(store: Store) -> None:
    with pytest.raises(StorageError, match="missing"):
        store.mark_verified("0" * 64 + ".safetensors")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"' + "0" * 64 + '.safetensors": [1]}'])
def test_damaged_records_only_cost_a_check(store: Store, content: str) -> None:
    name = put_block(store)
    store.verify(name)
    store.close()
    (store.data / "verified.json").write_text(content)
    (store.data / "peers.json").write_text(content)
    with Store(store.data) as again:
        assert again.held() == frozenset()
        assert again.load_peers() == ()
        assert again.verify(name)


def test_peers_are_remembered_bounded(store: Store) -> None:
    peers = [Endpoint("127.0.0.1", port) for port in range(7000, 7000 + MAX_PEERS + 50)]
    store.save_peers(peers)
    assert store.load_peers() == tuple(peers[:MAX_PEERS])
    (store.data / "peers.json").write_text('["127.0.0.1:1", "nonsense", 7, "[::1]:2", "127.0.0.1:1"]')
    assert store.load_peers() == (Endpoint("127.0.0.1", 1), Endpoint("::1", 2))


def test_torrents_are_kept(store: Store) -> None:
    assert store.load_torrent(b"v" * 32) is None
    store.save_torrent(b"v" * 32, b"torrent")
    assert store.load_torrent(b"v" * 32) == b"torrent"
    assert store.model_folder(b"v" * 32).parent == store.models
