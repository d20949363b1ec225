"""A span that its holder's budget has no room for as published: held in fewer bits, and used like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import torrentlm
from tests.e2e import checkpoint
from tests.e2e.processes import Seed, run
from tests.swarm.nodes import in_trio
from torrentlm.compute.costs import Measurement
from torrentlm.compute.devices import DeviceInfo
from torrentlm.compute.measure import PRECISIONS, Prepared, Sizes, measure
from torrentlm.compute.precision import Precisions
from torrentlm.config import NodeConfig, Recipe
from torrentlm.errors import ConfigError
from torrentlm.manifest.magnet import Magnet
from torrentlm.node.node import open_node
from torrentlm.node.status import read_status
from torrentlm.publish.publish import publish
from torrentlm.records import Span
from torrentlm.swarm.store import Store

PROMPT = "Once upon a time"


@dataclass(frozen=True, slots=True)
class Published:
    folder: Path
    checkpoint: Path
    magnet: str


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """A tiny model published in F32, 0.6 MB, by a node that serves nothing of it."""
    folder = tmp_path_factory.mktemp("precision")
    source = checkpoint.make(folder / "checkpoint")
    recipe = folder / "model.toml"
    recipe.write_text(f'[model]\nname = "Tiny"\n\n[model.source]\nfolder = "{source}"\n')
    with Seed(str(recipe), folder / "publisher", "--blocks", "none") as publisher:
        yield Published(folder, source, publisher.wait_for("ready")["magnet"])


def precision_of(data: Path) -> str:
    status = read_status(data)
    assert status is not None
    return str(status["models"][0]["precision"])


@pytest.mark.parametrize(("ram", "precision"), [("410kB", "BF16"), ("350kB", "BF16+INT8"), ("200kB", "BF16+INT8+INT4")])
def test_a_budget_that_holds_the_span_only_in_less(
    published: Published, tmp_path: Path, ram: str, precision: str
) -> None:
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5", "--ram", ram) as holder:
        said = holder.wait_for("precision")
        assert said["precision"] == precision
        assert said["why"].startswith("blocks 0-5 need 0.6 MB for weights in F32, and ram leaves 0.")
        magnet = holder.wait_for("ready")["magnet"]
        with torrentlm.connect(magnet, data=tmp_path / "client", port=0, dht_bootstrap=["none"]) as model:
            assert len("".join(model.generate(PROMPT, max_new_tokens=12, stream=True))) > 0
        assert precision_of(tmp_path / "holder") == precision


def test_what_is_published_fits_and_nothing_is_said(published: Published, tmp_path: Path) -> None:
    with Seed(published.magnet, tmp_path / "holder", "--blocks", "0-5", "--ram", "1MB") as holder:
        events = [holder.events.get(timeout=60)]
        while events[-1] is not None and events[-1]["event"] != "ready":
            events.append(holder.events.get(timeout=60))
        assert "precision" not in {event["event"] for event in events if event is not None}
        assert precision_of(tmp_path / "holder") == "F32"


def test_where_even_the_least_is_too_much_it_is_one_sentence(published: Published, tmp_path: Path) -> None:
    found = run(
        "seed", published.magnet, "--data", str(tmp_path), "--blocks", "0-5", "--ram", "100kB", "--port", "0",
        "--dht-bootstrap", "none",
    )  # fmt: skip
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "--blocks 0-5 needs at least 0.1 MB for weights in BF16+INT4" in found.stderr
    assert not list((tmp_path / "blocks").glob("*.safetensors")), "it is said before anything is fetched"


@pytest.mark.parametrize(("how", "lacks"), [({"precision": "F16"}, "F16"), ({"precision": "INT8"}, "BF16")])
@in_trio(60)
async def test_a_named_precision_that_the_device_lacks(
    published: Published, tmp_path: Path, how: dict[str, Any], lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(weight: torch.Tensor, device: torch.device) -> Prepared:
        raise RuntimeError("not implemented here")

    monkeypatch.setitem(PRECISIONS, lacks, absent)
    config = NodeConfig(tmp_path, "127.0.0.1", 0, (), (), Span(0, 5), **how)
    async with open_node(config) as holder:
        membership = await holder.join(Magnet.parse(published.magnet), timeout=30)
        with pytest.raises(ConfigError, match=rf"{lacks}.* is not to be had on this device .*: choose F32 or "):
            await holder.hold(membership)
    assert not list((tmp_path / "blocks").glob("*.safetensors"))


@in_trio(90)
async def test_a_processor_that_is_slow_in_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without instructions for BF16 is measured, and keeps blocks in F32 where that is clearly faster."""
    with Store(tmp_path / "node") as store:
        source = checkpoint.make(tmp_path / "checkpoint")
        magnet = publish(Recipe("Tiny", source, dtype="BF16"), store).magnet
    monkeypatch.setattr("torrentlm.node.membership.instruction_sets", lambda: ("AVX2",))

    def slow(devices: Sequence[DeviceInfo], folder: Path, say: object) -> tuple[Measurement, ...]:
        """As it is, but that BF16 takes what it takes without its instructions."""
        found = measure(devices[0], sizes=Sizes(side=64, prompt=4, working_set=1 << 18, copied=1 << 18))
        rate = found.cost("F32").decode / 4
        costs = tuple(replace(cost, decode=rate) if cost.precision == "BF16" else cost for cost in found.precisions)
        return (replace(found, precisions=costs),)

    monkeypatch.setattr("torrentlm.node.computing.measured", slow)
    said: list[dict[str, Any]] = []
    async with open_node(NodeConfig(tmp_path / "node", "127.0.0.1", 0, (), (), Span(0, 5)), said.append) as node:
        membership = await node.join(magnet, timeout=30)
        await node.hold(membership)
        assert membership.precisions == Precisions("F32") and membership.manifest.dtype == "BF16"
    [event] = [event for event in said if event["event"] == "precision"]
    assert event["precision"] == "F32"
    assert event["why"].startswith("BF16 takes this processor 4.0 times as long as F32; held instead: blocks 0-5 in ")
