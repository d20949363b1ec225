from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import libtorrent as lt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torrentlm import bencode
from torrentlm.errors import ArtifactError
from torrentlm.manifest import torrent as torrents
from torrentlm.manifest.torrent import LEAF, Hasher, Torrent, multi_file, piece_length, safe_name, single_file

SIZES = [1, 100, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF, 3 * LEAF + 5, 4 * LEAF, 4 * LEAF + 1, 9 * LEAF + 7, 64 * LEAF + 1]


def content(size: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def single(data: bytes, length: int, name: str = "a.safetensors") -> Torrent:
    hasher = Hasher(length)
    hasher.update(data)
    return single_file(name, hasher.finish(), length)


FOLDER = {
    "manifest.msgpack": content(700, 1),
    "config.json": content(3, 2),
    "tokenizer.json": content(3 * LEAF + 1, 3),
    "blocks/b.torrent": content(LEAF, 4),
    "blocks/a.torrent": content(LEAF + 1, 5),
    "blocks.txt": content(9, 6),
}


def as_libtorrent(torrent: Torrent) -> lt.torrent_info:
    """Loaded by libtorrent, as a hybrid torrent whose both info-hashes are ours."""
    info = lt.torrent_info(torrent.to_bytes())
    hashes = info.info_hashes()
    assert hashes.has_v1()
    assert hashes.has_v2()
    assert hashes.v1.to_bytes() == torrent.v1
    assert hashes.v2.to_bytes() == torrent.v2
    return info


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [LEAF, 4 * LEAF])
def test_hashes_agree_with_libtorrents_own(size: int, length: int, tmp_path: Path) -> None:
    data = content(size)
    ours = single(data, length)
    (tmp_path / "a.safetensors").write_bytes(data)
    made = lt.create_torrent([lt.create_file_entry("a.safetensors", size)], length)
    lt.set_piece_hashes(made, str(tmp_path))
    theirs = bencode.decode(bencode.encode(made.generate()), max_size=1 << 20)  # type: ignore[arg-type]
    assert isinstance(theirs, dict)
    info, expected = bencode.decode(ours.info, max_size=1 << 20), theirs[b"info"]
    assert isinstance(info, dict)
    assert isinstance(expected, dict)
    assert info[b"pieces"] == expected[b"pieces"]
    assert info[b"file tree"] == expected[b"file tree"]
    assert dict(ours.layers) == theirs.get(b"piece layers", {})
    as_libtorrent(ours)


@given(st.lists(st.integers(0, 3 * LEAF), max_size=6))
@settings(max_examples=30, deadline=None)
def test_hasher_takes_any_chunks(cuts: list[int]) -> None:
    data = content(sum(cuts) + 1)
    hasher, at = Hasher(2 * LEAF), 0
    for cut in [*cuts, 1]:
        hasher.update(data[at : at + cut])
        at += cut
    whole = Hasher(2 * LEAF)
    whole.update(data)
    assert hasher.finish() == whole.finish()


def test_pieces_root_of_a_file(tmp_path: Path) -> None:
    for size in (1, LEAF, 5 * LEAF + 3, 70 * LEAF):
        path = tmp_path / "f"
        path.write_bytes(content(size))
        assert torrents.pieces_root(path) == single(content(size), LEAF).files[0].root


def test_info_dictionary_is_exactly_what_the_design_says() -> None:
    torrent = single(content(3 * LEAF), 2 * LEAF)
    info = bencode.decode(torrent.info, max_size=1 << 20)
    assert isinstance(info, dict)
    assert sorted(info) == [b"file tree", b"length", b"meta version", b"name", b"piece length", b"pieces"]
    metainfo = bencode.decode(torrent.to_bytes(), max_size=1 << 20)
    assert isinstance(metainfo, dict)
    assert sorted(metainfo) == [b"info", b"piece layers"]


def test_folder_is_a_hybrid_torrent_for_libtorrent() -> None:
    torrent = multi_file("model", FOLDER)
    info = as_libtorrent(torrent)
    storage = info.layout() if hasattr(info, "layout") else info.files()
    paths = {
        storage.file_path(index): storage.file_size(index)
        for index in range(storage.num_files())
        if not storage.file_flags(index) & lt.file_storage.flag_pad_file
    }
    assert paths == {f"model/{path}": len(data) for path, data in FOLDER.items()}
    assert torrent.size == sum(map(len, FOLDER.values()))
    assert multi_file("model", dict(reversed(FOLDER.items()))) == torrent


@pytest.mark.parametrize("kind", ["single", "folder", "one-file folder"])
def test_real_session_finds_the_files_complete(kind: str, tmp_path: Path) -> None:
    data = content(70 * LEAF + 5)
    files = {"single": {}, "folder": FOLDER, "one-file folder": {"x": data}}[kind]
    torrent = multi_file("model", files) if files else single(data, 2 * LEAF, "model")
    for path, part in files.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(part)
    if not files:
        (tmp_path / "model").write_bytes(data)
    assert checked(torrent, tmp_path) == 1.0
    victim = tmp_path / "model" / (min(files) if files else "")
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    assert checked(torrent, tmp_path) < 1.0


def checked(torrent: Torrent, folder: Path) -> float:
    """The share of pieces that a real libtorrent session, talking to nobody, finds good on disk."""
    off = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    session = lt.session({"listen_interfaces": "127.0.0.1:0", "alert_mask": 0, **off})
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(torrent.to_bytes())
    params.save_path = str(folder)
    params.flags &= ~lt.torrent_flags.paused
    handle = session.add_torrent(params)
    busy = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
    for _ in range(500):
        status = handle.status()
        if status.errc.value():
            raise AssertionError(status.errc.message())
        if status.state not in busy:
            return sum(handle.status().pieces) / params.ti.num_pieces()
        time.sleep(0.02)
    raise AssertionError("libtorrent did not finish checking")


@pytest.mark.parametrize("torrent", [single(content(s), LEAF) for s in (5, 9 * LEAF)] + [multi_file("m", FOLDER)])
def test_round_trip(torrent: Torrent) -> None:
    parsed = Torrent.from_bytes(torrent.to_bytes())
    assert parsed == torrent
    assert (parsed.v1, parsed.v2) == (torrent.v1, torrent.v2)
    extended = b"d7:comment1:x" + torrent.to_bytes()[1:]
    assert Torrent.from_bytes(extended) == torrent
    without_layers = Torrent.from_bytes(bencode.encode({"info": bencode.decode(torrent.info, max_size=1 << 20)}))  # type: ignore[dict-item]
    assert without_layers.v2 == torrent.v2
    assert not without_layers.layers


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_torrent_is_refused_or_another_one(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from([single(content(9 * LEAF), LEAF), multi_file("m", FOLDER)]))
    encoded = bytearray(good.to_bytes())
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ArtifactError):
        parsed = Torrent.from_bytes(bytes(encoded))
        assert Torrent.from_bytes(parsed.to_bytes()) == parsed
        assert parsed.v2 == hashlib.sha256(parsed.info).digest()


def changed(**changes: object) -> bytes:
    metainfo = bencode.decode(single(content(9 * LEAF), LEAF).to_bytes(), max_size=1 << 20)
    assert isinstance(metainfo, dict)
    info = metainfo[b"info"]
    assert isinstance(info, dict)
    for key, value in changes.items():
        info[key.replace("_", " ").encode()] = value  # type: ignore[assignment]
    return bencode.encode(metainfo)


def leaf(size: object = 1, root: object = bytes(32)) -> dict[bytes, object]:
    return {b"": {b"length": size, b"pieces root": root}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"de",
        b"le",
        b"d4:infodee",
        b"d4:infolee",
        changed(private=1),
        changed(piece_length=LEAF + 1),
        changed(piece_length=LEAF * 2),
        changed(piece_length=0),
        changed(piece_length=1 << 40),
        changed(length=5),
        changed(name=b"../x"),
        changed(pieces=b""),
        changed(meta_version=3),
        changed(file_tree={}),
        changed(file_tree=[]),
        changed(file_tree=leaf()),
        changed(file_tree={b"..": leaf()}),
        changed(file_tree={b"a/b": leaf()}),
        changed(file_tree={b"a\\b": leaf()}),
        changed(file_tree={b"C:": leaf()}),
        changed(file_tree={b"\xff": leaf()}),
        changed(file_tree={b"a": {**leaf(), b"b": leaf()}}),
        changed(file_tree={b"a": leaf(size=0)}),
        changed(file_tree={b"a": leaf(size=b"1")}),
        changed(file_tree={b"a": leaf(root=b"short")}),
        changed(file_tree={b"d": {b"d": {b"d": {b"d": {b"d": {b"d": {b"d": {b"d": {b"d": leaf()}}}}}}}}}),
    ],
)
def test_refuses(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"^x\.torrent is not a torrent"):
        Torrent.from_bytes(data, "x.torrent")


def test_wrong_piece_layers_are_refused() -> None:
    torrent = single(content(9 * LEAF), LEAF)
    ((root, layer),) = torrent.layers.items()
    info = bencode.decode(torrent.info, max_size=1 << 20)
    for layers in ({root: layer[32:]}, {root: layer[32:] + layer[:32]}, {bytes(32): layer}, [], {root: 1}):
        with pytest.raises(ArtifactError, match="layers"):
            Torrent.from_bytes(bencode.encode({"info": info, "piece layers": layers}))  # type: ignore[dict-item]


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", ".pad/1", "a\\b", "a\0", "x" * 256])
def test_unsafe_paths_are_not_published(path: str) -> None:
    with pytest.raises(ValueError):
        multi_file("model", {path: b"x"})


def test_empty_files_and_clashes_are_not_published() -> None:
    for files in ({"a": b""}, {}, {"a": b"x", "a/b": b"x"}):
        with pytest.raises(ValueError):
            multi_file("model", files)


def test_piece_length_rule() -> None:
    assert piece_length(1) == LEAF
    assert piece_length(1024 * LEAF) == LEAF
    assert piece_length(1024 * LEAF + 1) == 2 * LEAF
    assert piece_length(1, 1 << 18) == 1 << 18
    assert piece_length(1 << 50) == 16 << 20


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmolLM2-135M", "SmolLM2-135M"),
        ("a/b c", "a-b-c"),
        ("../..", "model"),
        ("", "model"),
        ("é", "model"),
        ("x" * 300, "x" * 100),
    ],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name
