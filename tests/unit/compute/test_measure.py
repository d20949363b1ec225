"""Every precision is measured or lacking, and only what is not remembered is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torrentlm.compute import measure as module
from torrentlm.compute.costs import FILE_NAME, Measurement
from torrentlm.compute.devices import DeviceInfo, processor
from torrentlm.compute.measure import PRECISIONS, Prepared, Sizes, key_of, measure, measured, tried
from torrentlm.errors import ConfigError

SMALL = Sizes(side=64, prompt=4, working_set=1 << 18, copied=1 << 18)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_S", 0.0)
    monkeypatch.setattr(module, "PROCESSOR", SMALL)


@pytest.fixture
def cpu() -> DeviceInfo:
    return processor()


def eighths(weight: torch.Tensor, device: torch.device) -> Prepared:
    """A precision of one byte and a scale, as a module for quantized weights may add it."""
    scale = weight.abs().amax() / 127
    weights = ((weight / scale).round().to(torch.int8), scale)
    return Prepared(weights, torch.float32, lambda x, w, s: x @ (w.float() * s).T)


def test_every_precision_has_a_cost(cpu: DeviceInfo) -> None:
    found = measure(cpu)
    assert found.device == "cpu" and found.read > 0 and found.upload > 0 and found.pinned == 0
    assert [cost.precision for cost in found.precisions] == ["F32", "BF16", "F16", "INT8", "INT4"]
    for cost in found.precisions:
        assert not cost.lacking and cost.decode > 0 and cost.prompt > 0
    assert [cost.bytes_per_weight for cost in found.precisions] == [4, 2, 2, 1 + 2 / SMALL.side, 0.625]
    errors = {cost.precision: cost.error for cost in found.precisions}
    assert errors["F32"] < 1e-6 < errors["F16"] < errors["BF16"] < errors["INT8"] < errors["INT4"] < 0.2


def test_what_is_there_can_be_told_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rate", lambda *given: pytest.fail("nothing is to be measured"))

    def refused(weight: torch.Tensor, device: torch.device) -> Prepared:
        raise ConfigError("INT4 needs a GPU of another kind.")

    found = tried(torch.device("cpu"), PRECISIONS | {"INT4": refused})
    assert {name for name, cost in found.items() if cost.lacking} == {"INT4"}
    assert found["INT4"].lacking == "INT4 needs a GPU of another kind."


def test_what_the_device_or_torch_lacks_says_why(cpu: DeviceInfo) -> None:
    def refused(weight: torch.Tensor, device: torch.device) -> Prepared:
        raise ConfigError("INT4 needs a GPU of another kind.")

    def broken(weight: torch.Tensor, device: torch.device) -> Prepared:
        raise RuntimeError("not implemented for 'Half'\nand a stack")

    def late(weight: torch.Tensor, device: torch.device) -> Prepared:
        return Prepared((weight,), torch.float32, lambda x, w: torch.ones(3) @ torch.ones(4))

    def wrong(weight: torch.Tensor, device: torch.device) -> Prepared:
        return Prepared((weight,), torch.float32, lambda x, w: x @ w.T * torch.nan)

    def off(weight: torch.Tensor, device: torch.device) -> Prepared:
        return Prepared((weight,), torch.float32, lambda x, w: x @ w.T * -1)

    found = measure(cpu, {"F32": PRECISIONS["F32"], "A": refused, "B": broken, "C": late, "D": wrong, "E": off})
    lacking = {cost.precision: cost.lacking for cost in found.precisions}
    assert lacking["F32"] == "" and lacking["A"] == "INT4 needs a GPU of another kind."
    assert lacking["B"].endswith("lacks B (not implemented for 'Half').")
    assert "lacks C (" in lacking["C"]
    assert "something else than products in D" in lacking["D"] and "something else" in lacking["E"]
    assert all(cost.decode == cost.prompt == 0 for cost in found.precisions if cost.lacking)


def test_a_device_that_is_gone(cpu: DeviceInfo) -> None:
    gone = DeviceInfo("cuda:9", "cuda", "A GPU", 1 << 30, 1 << 30)
    with pytest.raises(ConfigError, match=r"cuda:9 \(A GPU\) cannot be measured: .*--devices"):
        measure(gone, sizes=SMALL)


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = module.measure
        monkeypatch.setattr(module, "measure", lambda *given: (self._count(), real(*given))[1])

    def _count(self) -> None:
        self.count += 1


def test_measured_once_and_remembered(cpu: DeviceInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    [first] = measured([cpu], tmp_path, pytest.fail)
    assert measured([cpu], tmp_path, pytest.fail) == (first,) and counter.count == 1
    measured([cpu], tmp_path, pytest.fail, precisions={"INT8": eighths})
    assert counter.count == 2, "another list of precisions is another measurement"
    measured([cpu], tmp_path, pytest.fail, again=True)
    assert counter.count == 3
    (tmp_path / FILE_NAME).write_text("{")
    measured([cpu], tmp_path, pytest.fail)
    assert counter.count == 4


def test_where_nothing_can_be_remembered_one_sentence_says_so(
    cpu: DeviceInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, said = Counter(monkeypatch), list[str]()
    (tmp_path / "file").write_text("")
    for _ in range(2):
        found = measured([cpu, cpu], tmp_path / "file", said.append)
        assert len(found) == 2 and all(isinstance(each, Measurement) for each in found)
    assert counter.count == 4
    assert len(said) == 2 and "measured at every start" in said[0]


def test_a_device_that_cannot_be_used_is_left_out(cpu: DeviceInfo, tmp_path: Path) -> None:
    broken = DeviceInfo("cuda:0", "cuda", "A GPU", 0, 0, problem="cuda:0 does not answer.")
    assert [found.device for found in measured([broken, cpu], tmp_path, pytest.fail)] == ["cpu"]


def test_the_key_follows_threads_and_device(cpu: DeviceInfo) -> None:
    key = key_of(cpu)
    assert key["torch"] == torch.__version__ and key["threads"] == torch.get_num_threads()
    assert key_of(DeviceInfo("cuda:0", "cuda", "A GPU", 1, 1, driver="driver 1"))["threads"] == 0


def test_little_free_memory_makes_it_smaller() -> None:
    little = module._within(DeviceInfo("cpu", "cpu", "x", 1 << 30, 64 << 20), module.ACCELERATOR)
    assert little.working_set == 16 << 20 and little.copied == 8 << 20
