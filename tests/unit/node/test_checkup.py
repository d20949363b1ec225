"""What is wrong is said in a sentence each, and what is right is not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from torrentlm.compute import measure
from torrentlm.compute.costs import Measurement, PrecisionCost
from torrentlm.compute.devices import DeviceInfo
from torrentlm.config import NodeConfig
from torrentlm.node import checkup
from torrentlm.node.checkup import device_faults, disk_faults, examine, library_faults
from torrentlm.records import Span
from torrentlm.swarm.store import Store

GIB = 1 << 30
REQUIRED = ("torch>=2.5", "rich>=13", 'pytest>=8; extra == "test"', "zstandard>=0.22")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLICE_S", 0.0)
    monkeypatch.setattr(measure, "PROCESSOR", measure.Sizes(side=64, prompt=4, working_set=1 << 18, copied=1 << 18))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def node(data: Path, **settings: object) -> NodeConfig:
    return NodeConfig(**{"data": data, "host": "127.0.0.1", "port": 0, **settings})  # type: ignore[arg-type]


def test_libraries() -> None:
    assert library_faults(REQUIRED, {"torch": "2.13.0+cpu", "rich": "13", "zstandard": "0.25.0"}) == []
    faults = library_faults(REQUIRED, {"torch": "2.4.1", "zstandard": "0.9"})
    assert [fault.split(";")[0] for fault in faults] == [
        "The library torch 2.4.1 is older than 2.5",
        "The library rich is not installed",
        "The library zstandard 0.9 is older than 0.22",
    ]
    assert "pip install 'rich>=13'" in faults[1]


def test_disks(tmp_path: Path) -> None:
    assert disk_faults(node(tmp_path), 5 * GIB) == disk_faults(node(tmp_path, disk=4 * GIB), 5 * GIB) == []
    assert "has only 5.0 MB free; make room" in disk_faults(node(tmp_path), 5_000_000)[0]
    assert "less than the 6,442.5 MB of --disk" in disk_faults(node(tmp_path, disk=6 * GIB), 5 * GIB)[0]


def test_devices() -> None:
    cpu = DeviceInfo("cpu", "cpu", "A processor", 8 * GIB, 4 * GIB)
    broken = DeviceInfo("cuda:0", "cuda", "A GPU", 0, 0, problem="cuda:0 does not answer.")
    costs = (PrecisionCost("F32", 4.0, 1.0, 1.0), PrecisionCost("BF16", lacking="cpu lacks BF16."))
    known = {"cpu": Measurement("cpu", 1.0, 1.0, 0.0, costs)}
    assert device_faults(NodeConfig(), (cpu,), {"cpu": GIB}, known) == []
    assert device_faults(NodeConfig(precision="F32"), (cpu,), {"cpu": GIB}, known) == []
    assert device_faults(NodeConfig(precision="BF16"), (cpu,), {"cpu": GIB}, known) == [
        "--precision BF16: cpu lacks BF16."
    ]
    part = NodeConfig(precision_of=((Span(1, 2), "BF16"), (Span(3, 3), "F32")))
    assert device_faults(part, (cpu,), {"cpu": GIB}, known) == ["--precision-of BF16: cpu lacks BF16."]
    assert device_faults(NodeConfig(), (cpu, broken), {"cpu": GIB}, known) == ["cuda:0 does not answer."]
    assert "hardly a block" in device_faults(NodeConfig(), (cpu,), {"cpu": 1000}, known)[0]


def test_a_machine_that_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "unused_hardware", lambda: "")
    found = examine(node(tmp_path / "data", devices=("cpu",), ram=GIB))
    assert found["faults"] == []
    assert json.loads(json.dumps(found))["data"] == found["data"]
    [cpu] = [device for device in found["devices"] if device["name"] == "cpu"]
    assert cpu["used"] and cpu["budget"] == GIB == cpu["weights_budget"] + cpu["kv_budget"]
    assert [cost["precision"] for cost in cpu["measured"]["precisions"]] == list(measure.PRECISIONS)
    assert found["network"]["tcp_loopback"] and found["network"]["udp_loopback"] and found["network"]["port_free"]
    assert found["data"]["usable"] and not found["data"]["in_use"] and found["data"]["free"] > 0
    assert all(found["libraries"].values()) and "torch" in found["libraries"]
    again = examine(node(tmp_path / "data", devices=("cpu",), ram=GIB))
    assert again["devices"][0]["measured"] == cpu["measured"], "it was remembered"


def test_parts_of_the_processor_are_shown_with_its_measurement(tmp_path: Path) -> None:
    found = examine(node(tmp_path / "data", devices=("cpu:0", "cpu:1"), ram=GIB))
    parts = [device for device in found["devices"] if device["backend"] == "cpu"]
    assert [(part["name"], part["used"], part["budget"]) for part in parts] == [
        ("cpu:0", True, GIB // 2),
        ("cpu:1", True, GIB // 2),
    ]
    assert parts[0]["measured"] == parts[1]["measured"] and parts[0]["measured"]["device"] == "cpu"


def test_a_port_that_another_program_has(tmp_path: Path, taken: int) -> None:
    found = examine(node(tmp_path, port=taken, ram=GIB, devices=("cpu",)))
    assert not found["network"]["port_free"]
    assert any(f"Port {taken} is in use by another program" in fault for fault in found["faults"])


def test_a_node_that_runs_already_is_no_fault(tmp_path: Path, taken: int) -> None:
    with Store(tmp_path):
        found = examine(node(tmp_path, port=taken, ram=GIB, devices=("cpu",)))
    assert found["data"]["in_use"] and not found["network"]["port_free"]
    assert not any("Port" in fault or "in use" in fault for fault in found["faults"])


def test_a_folder_that_cannot_be_used_and_a_device_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = examine(node(tmp_path / "file" / "data", devices=("cuda:63",)))
    assert not found["data"]["usable"] and not any(device["used"] for device in found["devices"])
    assert any("no device cuda:63 here" in fault for fault in found["faults"])
    assert any(str(tmp_path / "file" / "data") in fault for fault in found["faults"])
    assert any("measured at every start" in fault for fault in found["faults"])
    assert found["devices"][0]["measured"] is not None


def test_a_store_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("torrentlm store 99\n")
    found = examine(node(tmp_path, ram=GIB, devices=("cpu",)))
    assert any("written by another version" in fault for fault in found["faults"])


def test_loopback_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkup, "_udp_works", forbidden)
    found = examine(node(tmp_path, ram=GIB, devices=("cpu",)))
    assert found["network"]["tcp_loopback"] and not found["network"]["udp_loopback"]
    assert any("UDP does not work on 127.0.0.1 (operation not permitted)" in fault for fault in found["faults"])
