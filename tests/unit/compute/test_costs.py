"""What was measured is remembered under its key, and nothing that is damaged is believed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from torrentlm.compute.costs import FILE_NAME, MAX_ENTRIES, MAX_FILE, Measurement, PrecisionCost, recall, remember
from torrentlm.errors import StorageError

KEY = {"torch": "2.13.0", "device": "cpu", "features": ["AVX2"], "threads": 2}
DONE = Measurement(
    *("cpu", 3e10, 1e10, 0.0),
    (PrecisionCost("F32", 4.0, 1e9, 1e11, 0.0), PrecisionCost("F16", lacking="cpu lacks F16.")),
    *(1.5, 0.25),
)


def test_what_was_measured_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert recall(folder, KEY) is None
    remember(folder, KEY, DONE)
    assert recall(folder, KEY) == DONE
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_a_cost_that_is_not_there_is_lacking() -> None:
    assert DONE.cost("F32").decode == 1e9
    assert DONE.cost("F16").lacking == "cpu lacks F16."
    assert "INT3 has not been measured" in DONE.cost("INT3").lacking


@pytest.mark.parametrize("changed", [{"torch": "2.14.0"}, {"threads": 1}, {"features": []}, {"driver": "x"}])
def test_another_key_is_another_measurement(changed: dict[str, Any], tmp_path: Path) -> None:
    remember(tmp_path, KEY, DONE)
    assert recall(tmp_path, KEY | changed) is None
    other = Measurement("cpu", 1.0, 1.0, 1.0, DONE.precisions)
    remember(tmp_path, KEY | changed, other)
    assert (recall(tmp_path, KEY), recall(tmp_path, KEY | changed)) == (DONE, other)
    remember(tmp_path, KEY, other)
    assert recall(tmp_path, KEY) == other


def test_the_file_stays_small(tmp_path: Path) -> None:
    for threads in range(MAX_ENTRIES + 3):
        remember(tmp_path, KEY | {"threads": threads}, DONE)
    assert recall(tmp_path, KEY | {"threads": 2}) is None
    assert recall(tmp_path, KEY | {"threads": 3}) == DONE


def damaged(text: str) -> list[str]:
    document = json.loads(text)
    found = [
        text[: len(text) // 2],
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        text.replace("measurements 1", "measurements 2"),
    ]
    for path in ("read", "upload", "pinned", "precisions", "device"):
        for wrong in (None, "x", -1, True, [], {}, [1], "NaN", "y" * 2000):
            if path == "device" and wrong == "x":
                continue
            changed = json.loads(text)
            changed["entries"][0]["measurement"][path] = float("nan") if wrong == "NaN" else wrong
            found.append(json.dumps(changed))
    for name, wrong in (("decode", 0), ("bytes_per_weight", -1), ("error", None), ("lacking", 3)):
        changed = json.loads(text)
        changed["entries"][0]["measurement"]["precisions"][0][name] = wrong
        found.append(json.dumps(changed))
    for entries in (None, {}, [None], [[]], [{"key": 1}], [{"key": document["entries"][0]["key"]}]):
        found.append(json.dumps(document | {"entries": entries}))
    return found


def test_damage_is_measured_again(tmp_path: Path) -> None:
    remember(tmp_path, KEY, DONE)
    file = tmp_path / FILE_NAME
    for text in damaged(file.read_text()):
        file.write_text(text)
        assert recall(tmp_path, KEY) is None, text[:200]
    file.write_bytes(b"\xff" * 100)
    assert recall(tmp_path, KEY) is None
    file.write_text(" " * (MAX_FILE + 1))
    assert recall(tmp_path, KEY) is None
    remember(tmp_path, KEY, DONE)
    assert recall(tmp_path, KEY) == DONE


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be remembered in .*--data"):
        remember(tmp_path / "file" / "folder", KEY, DONE)

    def read_only(*given: object, **named: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(StorageError, match="read-only file system"):
        remember(tmp_path, KEY, DONE)
    assert not (tmp_path / FILE_NAME).exists()


def test_a_kill_while_writing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(tmp_path, KEY, DONE)
    real = Path.write_text

    def torn(path: Path, text: str, **named: Any) -> None:
        real(path, text[: len(text) // 2], **named)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(StorageError, match="no space left"):
        remember(tmp_path, KEY | {"threads": 9}, DONE)
    assert recall(tmp_path, KEY) == DONE
