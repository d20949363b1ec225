"""Which precision each block of a device's span is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.compute.costs import PrecisionCost
from torrentlm.compute.precision import FINEST_FIRST, Precisions
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.manifest.manifest import BlockEntry, BlockFile, FileEntry, Manifest, Side
from torrentlm.node.precisions import (
    NOT_ASKED,
    Budget,
    asked_for,
    bytes_of,
    decide,
    must_ask,
    must_measure,
    reason,
    smallest,
)
from torrentlm.records import Span

LAYERS = 6
WHOLE = Span(0, LAYERS + 1)
TABLE = canonical.layout([TensorSpec("weight", "BF16", (512, 64))])
LAYER = canonical.layout(
    [TensorSpec(name, "BF16", (128, 64)) for name in ("up", "down")] + [TensorSpec("norm", "BF16", (64,))]
)
GPU = Budget(0, "vram", None, binds=False)


def model(*, alike: tuple[int, ...] = (), **changed: Any) -> Manifest:
    """A table, layers, and a head that shares the table; the blocks in ``alike`` are one layer that runs again."""

    def layer(block: int) -> BlockEntry:
        file = min(alike) if block in alike else block
        return BlockEntry("layers", Span(block - 1, block - 1), (BlockFile(file, (("", f"layers.{block}."),)),))

    table = (BlockFile(0, (("", "table."),)),)
    made = Manifest(
        name="Tiny",
        architecture="Any",
        dtype="BF16",
        sides=(Side("layers", LAYERS),),
        blocks=(BlockEntry("stem", None, table), *map(layer, range(1, LAYERS + 1)), BlockEntry("head", None, table)),
        files=tuple(
            FileEntry(f"{number:064x}.safetensors", 1 << 16, bytes(20), bytes(32), min(number, 1))
            for number in range(LAYERS + 1)
        ),
        layouts=(TABLE, LAYER),
    )
    return replace(made, **changed)


def lacking(*names: str) -> Mapping[str, PrecisionCost]:
    return {
        name: PrecisionCost(name, lacking=f"This device has no arithmetic for {name}." if name in names else "")
        for name in FINEST_FIRST
    }


def budget(weights: int, *, binds: bool = True) -> Budget:
    return Budget(weights, "ram", weights * 4 // 3, binds)


PUBLISHED = bytes_of(model(), WHOLE, Precisions("BF16"))


def test_what_fits_stays_as_published_and_nobody_is_asked() -> None:
    assert decide(model(), NodeConfig(), WHOLE, budget(PUBLISHED)) == Precisions("BF16")
    assert not must_ask(model(), NodeConfig(), WHOLE, budget(PUBLISHED))


def test_a_guess_of_ours_binds_nobody() -> None:
    assert decide(model(), NodeConfig(), WHOLE, budget(1, binds=False)) == Precisions("BF16")
    assert not must_ask(model(), NodeConfig(), WHOLE, budget(1, binds=False))
    assert Budget.of(NodeConfig(), None).binds is Budget.of(NodeConfig(), 10).binds is False
    assert Budget.of(NodeConfig(ram=4000), None) == Budget(3000, "ram", 4000, True)
    assert Budget.of(NodeConfig(ram=1, vram=4000), 3000) == Budget(3000, "vram", 4000, True)


def test_a_budget_that_is_named_is_kept() -> None:
    given = budget(PUBLISHED - 1)
    assert must_ask(model(), NodeConfig(), WHOLE, given)
    found = decide(model(), NodeConfig(), WHOLE, given)
    assert found == Precisions("BF16", {3: "INT8"})
    said = reason(model(), NodeConfig(), WHOLE, given, found, NOT_ASKED)
    assert said.startswith("blocks 0-7 need 0.3 MB for weights in BF16, and ram leaves 0.3 MB for them; held instead: ")
    assert "blocks 0-2, 4-7 in BF16 and block 3 in INT8" in said


def test_ram_to_offload_to_comes_before_fewer_bits() -> None:
    given = replace(budget(PUBLISHED - 1), option="vram", aside=1)
    assert decide(model(), NodeConfig(), WHOLE, given) == Precisions("BF16")
    assert not must_ask(
        model(), NodeConfig(precision="F32"), WHOLE, replace(given, option="ram", weights=2 * PUBLISHED)
    )
    assert decide(model(), NodeConfig(), WHOLE, replace(given, weights=PUBLISHED - 2)) == Precisions(
        "BF16", {3: "INT8"}
    )
    with pytest.raises(ConfigError, match=r"but vram = 0\.4 MB with offload leaves 0\.0 MB for them: raise --vram to"):
        decide(model(), NodeConfig(), WHOLE, replace(given, weights=1000))
    assert Budget.of(NodeConfig(vram=4000), 3000, 50).limit == 3050


def test_the_least_that_would_do_is_named() -> None:
    with pytest.raises(ConfigError, match=r"needs at least 0\.1 MB for weights in BF16\+INT4, .*--ram to 0\.2 MB or"):
        decide(model(), NodeConfig(), WHOLE, budget(1000))
    with pytest.raises(ConfigError, match="in BF16, but ram = "):
        decide(model(floor="BF16"), NodeConfig(), WHOLE, budget(PUBLISHED - 1))
    with pytest.raises(ConfigError, match=r"needs 0\.3 MB for weights in BF16, but"):
        decide(model(), NodeConfig(precision="BF16"), WHOLE, budget(PUBLISHED - 1))


def test_the_floor_and_what_the_device_lacks_bound_it() -> None:
    given = budget(PUBLISHED - 1)
    assert decide(model(), NodeConfig(), WHOLE, given, lacking("INT8")).stored == {3: "INT4"}
    assert set(decide(model(floor="INT8"), NodeConfig(), WHOLE, budget(PUBLISHED - 9999)).stored.values()) == {"INT8"}
    assert decide(model(), NodeConfig(), WHOLE, GPU, lacking("BF16")) == Precisions("F32")
    said = reason(model(), NodeConfig(), WHOLE, GPU, Precisions("F32"), lacking("BF16"))
    assert said == (
        "this device lacks BF16 (This device has no arithmetic for BF16); held instead: blocks 0-7 in F32, 0.5 MB"
    )


@pytest.mark.parametrize(
    ("config", "lacks", "says"),
    [
        (NodeConfig(precision="F16"), ("F16", "BF16"), "F16 is not .* choose F32 or INT8 or INT4, or leave it to auto"),
        (
            NodeConfig(precision="INT4"),
            ("BF16",),
            r"INT4 computes in BF16, which is not .* \(This .* for BF16\): choose",
        ),
        (NodeConfig(precision_of=((Span(1, 2), "INT8"),)), ("INT8",), "INT8 is not to be had on this device"),
        (NodeConfig(precision="F32"), FINEST_FIRST, "compute on another device"),
    ],
)
def test_a_named_precision_that_is_lacking(config: NodeConfig, lacks: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        decide(model(), config, WHOLE, GPU, lacking(*lacks))


def test_who_is_asked() -> None:
    guess = budget(1, binds=False)
    assert must_ask(model(), NodeConfig(), WHOLE, GPU), "an accelerator may lack what is published"
    assert not must_ask(model(dtype="F32"), NodeConfig(), WHOLE, GPU)
    assert must_ask(model(), NodeConfig(precision="F16"), WHOLE, guess)
    assert not must_ask(model(), NodeConfig(precision="F32"), WHOLE, guess)
    part = NodeConfig(precision_of=((Span(1, 2), "INT8"),))
    assert must_ask(model(), part, WHOLE, guess)
    assert not must_ask(model(), part, Span(3, 5), guess)


def test_what_the_operator_names_stays() -> None:
    named = NodeConfig(precision_of=((Span(3, 3), "BF16"), (Span(0, 1), "INT4")))
    assert asked_for(model(), named) == Precisions("BF16", {1: "INT4"})
    saved = bytes_of(model(), WHOLE, Precisions("BF16", {1: "INT4"}))
    found = decide(model(), named, WHOLE, budget(saved - 1))
    assert found == Precisions("BF16", {1: "INT4", 2: "INT8"}), "block 3 would be the first, but is named"


def test_blocks_that_share_a_file_are_kept_alike() -> None:
    looped = model(alike=(2, 3, 5))
    needed = bytes_of(looped, Span(3, 6), Precisions("BF16"))
    found = decide(looped, NodeConfig(), Span(3, 6), budget(needed * 3 // 5))
    assert found.of(2) == found.of(3) == found.of(5) != "BF16"
    assert bytes_of(looped, Span(3, 6), found) <= needed * 3 // 5
    assert decide(model(), NodeConfig(), Span(0, 7), budget(PUBLISHED - 1)).of(7) == "BF16"


@given(st.integers(0, LAYERS + 1), st.integers(0, LAYERS + 1), st.integers(0, 110), st.sets(st.integers(1, LAYERS)))
def test_what_is_decided_fits_as_memory_counts_it(first: int, last: int, percent: int, alike: set[int]) -> None:
    held, span = model(alike=tuple(alike)), Span(min(first, last), max(first, last))
    limit = bytes_of(held, span, Precisions("BF16")) * percent // 100
    try:
        found = decide(held, NodeConfig(), span, budget(limit))
    except ConfigError:
        assert bytes_of(held, span, smallest(held, NodeConfig())) > limit
        return
    assert bytes_of(held, span, found) <= limit
    assert (found == Precisions("BF16")) == (percent >= 100 or not found.stored)
    assert all(held.blocks[block].kind == "layers" for block in found.stored)


def measured_as(**decode: float) -> Mapping[str, PrecisionCost]:
    return {name: PrecisionCost(name, decode=decode.get(name, 1.0)) for name in FINEST_FIRST}


WIDE = bytes_of(model(), WHOLE, Precisions("F32"))


def test_only_processors_that_may_be_slow_and_have_the_room_are_measured() -> None:
    old, new = ("AVX2", "F16C"), ("AVX2", "F16C", "AVX512", "AVX512-BF16")
    assert must_measure(model(), NodeConfig(), WHOLE, budget(WIDE), old)
    assert must_measure(model(), NodeConfig(), WHOLE, budget(WIDE, binds=False), old)
    assert not must_measure(model(), NodeConfig(), WHOLE, budget(WIDE), new)
    assert not must_measure(model(dtype="F32"), NodeConfig(), WHOLE, budget(WIDE), old)
    assert not must_measure(model(dtype="F16"), NodeConfig(), WHOLE, budget(WIDE), old)
    assert must_measure(model(dtype="F16"), NodeConfig(), WHOLE, budget(WIDE), ("AVX2",))
    assert not must_measure(model(), NodeConfig(), WHOLE, budget(WIDE - 1), old)
    assert not must_measure(model(), NodeConfig(precision="BF16"), WHOLE, budget(WIDE), old)
    assert not must_measure(model(), NodeConfig(precision_of=((Span(1, 1), "INT8"),)), WHOLE, budget(WIDE), old)
    assert not must_measure(model(), NodeConfig(), WHOLE, GPU, old)


def test_f32_is_taken_where_what_was_published_is_clearly_slower_and_it_fits() -> None:
    slow = measured_as(F32=3.0, BF16=1.0)
    room = budget(WIDE)
    assert decide(model(), NodeConfig(), WHOLE, room, slow) == Precisions("F32")
    said = reason(model(), NodeConfig(), WHOLE, room, Precisions("F32"), slow)
    assert said.startswith("BF16 takes this processor 3.0 times as long as F32; held instead: blocks 0-7 in F32, ")
    assert decide(model(), NodeConfig(), WHOLE, room, measured_as(F32=1.2)) == Precisions("BF16")
    assert decide(model(), NodeConfig(), WHOLE, budget(WIDE - 1), slow) == Precisions("BF16")
    assert decide(model(), NodeConfig(), WHOLE, budget(WIDE - 1, binds=False), slow) == Precisions("BF16")
    assert decide(model(), NodeConfig(precision="BF16"), WHOLE, room, slow) == Precisions("BF16")
    assert decide(model(), NodeConfig(), WHOLE, room, measured_as(F32=3.0, BF16=0.0)) == Precisions("BF16")  # untold
