"""These tests need a GPU. Where torch sees none they are not collected; ``tools/gpu_check`` runs them and says so.

``TORRENTLM_TEST_GPU=cuda:1`` names another one than the first. ``cpu`` runs what can run there: it tries the tests out
and says nothing of any GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.decoder import Decoder, make_decoder

Row = dict[str, Any]


def _device() -> str | None:
    if named := os.environ.get("TORRENTLM_TEST_GPU"):
        return named
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else None


DEVICE = _device()
collect_ignore_glob = [] if DEVICE else ["test_*.py"]
_rows: list[Row] = []


def pytest_report_header() -> list[str]:
    return [] if DEVICE else ["tests/gpu: no GPU was found, so the tests that need one are not collected"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    assert DEVICE is not None
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs CUDA or ROCm")
    return device


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return make_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def row() -> Callable[..., None]:
    """Adds a row to the table of ``tools/gpu_check``; rows of one precision become one."""

    def add(precision: str, **columns: Any) -> None:
        for known in _rows:
            if known["precision"] == precision:
                known.update(columns)
                return
        _rows.append({"precision": precision, **columns})

    return add


@pytest.fixture(scope="session", autouse=True)
def _report() -> Iterator[None]:
    yield
    if path := os.environ.get("TORRENTLM_TEST_GPU_ROWS"):
        Path(path).write_text(json.dumps(_rows))
