"""Which precision each block gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.compute.precision import (
    BlockSize,
    Precisions,
    TooLargeError,
    allowed,
    bytes_as,
    choose,
    compute_dtype,
)
from torrentlm.errors import ConfigError
from torrentlm.manifest.canonical import TensorSpec


@dataclass
class Cost:
    decode: float = 1.0
    lacking: str = ""


ALIKE = {name: Cost() for name in ("F32", "BF16", "F16", "INT8", "INT4")}
END = BlockSize((TensorSpec("norm", "F32", (1000,)),), storable=False)
LAYER = BlockSize((TensorSpec("matrix", "F32", (100, 32)), TensorSpec("norm", "F32", (10,))))
BLOCKS = {0: END, **dict.fromkeys(range(1, 6), LAYER), 6: END}
EVERYTHING = 1 << 40


def size(chosen: Precisions, blocks: Mapping[int, BlockSize] = BLOCKS) -> int:
    return sum(block.bytes_in(chosen.of(number), chosen.compute) for number, block in blocks.items())


def test_what_fits_is_run_as_published() -> None:
    for published in ("F32", "BF16", "F16"):
        assert choose(BLOCKS, EVERYTHING, ALIKE, published) == Precisions(published)


def test_what_fits_stays_as_published_whatever_is_faster() -> None:
    slow = ALIKE | {"BF16": Cost(0.3)}
    assert choose(BLOCKS, EVERYTHING, slow, "BF16") == Precisions("BF16")
    below = size(Precisions("F32")) - 1
    assert choose(BLOCKS, below, slow, "F32", overflowing=()) == Precisions("F16")
    assert choose(BLOCKS, below, ALIKE | {"F16": Cost(0.3)}, "F32", overflowing=()) == Precisions("BF16")


def test_only_as_much_is_lowered_as_must_be_the_middle_first() -> None:
    full = size(Precisions("BF16"))
    one = choose(BLOCKS, full - 1, ALIKE, "BF16")
    assert one == Precisions("BF16", {3: "INT8"})
    assert size(one) <= full - 1
    every = choose(BLOCKS, size(Precisions("BF16", dict.fromkeys(range(1, 6), "INT8"))) - 1, ALIKE, "BF16")
    assert every.stored == {1: "INT8", 2: "INT8", 3: "INT4", 4: "INT8", 5: "INT8"}
    assert choose(BLOCKS, size(Precisions("F32")) - 1, ALIKE, "F32") == Precisions("BF16")
    assert choose(BLOCKS, size(Precisions("F32")) - 1, ALIKE, "F32", overflowing=()) == Precisions("F16")


def test_a_budget_that_holds_nothing_names_the_least_that_would_do() -> None:
    least = size(Precisions("BF16", dict.fromkeys(range(1, 6), "INT4")))
    assert size(choose(BLOCKS, least, ALIKE, "F32")) == least
    with pytest.raises(TooLargeError, match=f"at least {least / 1e6:,.1f} MB") as caught:
        choose(BLOCKS, least - 1, ALIKE, "F32")
    assert caught.value.least == least == size(caught.value.precisions)
    with pytest.raises(TooLargeError) as caught:
        choose(BLOCKS, -1, ALIKE, "F32")
    assert caught.value.least == least


def test_the_floor_holds() -> None:
    with pytest.raises(ConfigError, match="raise the budget"):
        choose(BLOCKS, size(Precisions("BF16")) - 1, ALIKE, "BF16", floor="BF16")
    low = size(Precisions("BF16", dict.fromkeys(range(1, 6), "INT8")))
    assert set(choose(BLOCKS, low, ALIKE, "F32", floor="INT8").stored.values()) == {"INT8"}
    assert not allowed("INT4", "INT8")
    assert allowed("F16", "BF16")
    assert allowed("INT4", None)


def test_what_a_device_lacks_is_not_chosen() -> None:
    lacking = ALIKE | {"BF16": Cost(0, "no BF16 here"), "INT8": Cost(0, "no INT8 here")}
    assert choose(BLOCKS, EVERYTHING, lacking, "BF16") == Precisions("F32")
    assert "INT8" not in choose(BLOCKS, size(Precisions("F32")) // 3, lacking, "BF16").stored.values()
    with pytest.raises(ConfigError, match="no F32 here"):
        choose(BLOCKS, EVERYTHING, {"F32": Cost(0, "no F32 here")}, "F32")


def test_blocks_that_f16_cannot_hold_are_not_run_in_it() -> None:
    assert choose(BLOCKS, EVERYTHING, ALIKE, "F16", overflowing=[2]).compute != "F16"
    assert choose(BLOCKS, size(Precisions("F32")) - 1, ALIKE, "F32", overflowing=[2]) == Precisions("BF16")


def test_blocks_that_the_operator_named_stay() -> None:
    chosen = choose(BLOCKS, size(Precisions("BF16")) - 3000, ALIKE, "BF16", fixed={3: "BF16", 1: "INT4"})
    assert chosen.of(3) == "BF16"
    assert chosen.of(1) == "INT4"
    f32 = choose(BLOCKS, size(Precisions("F32")) - 10_000, ALIKE, "F32", fixed={3: "F32"})
    assert f32.compute == "F32" and f32.of(3) == "F32" and f32.stored


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(0, 300_000), st.sampled_from(list(ALIKE)))
def test_the_budget_holds_or_it_is_said(sizes: list[int], budget: int, floor: str) -> None:
    others = TensorSpec("norm", "F32", (5,)), TensorSpec("mask", "BOOL", (3,))
    blocks = {
        number + 1: BlockSize((TensorSpec("matrix", "F32", (rows, 32)), *others)) for number, rows in enumerate(sizes)
    }
    try:
        chosen = choose(blocks, budget, ALIKE, "BF16", floor=None if floor == "F16" else floor)
    except ConfigError:
        return
    assert size(chosen, blocks) <= budget
    assert all(floor == "F16" or allowed(chosen.of(block), floor) for block in blocks)


def test_bytes_of_tensors() -> None:
    assert bytes_as(TensorSpec("w", "F32", (64, 96)), "BF16") == 2 * 64 * 96
    assert bytes_as(TensorSpec("w", "F32", (64, 96)), "BF16", "INT8") == 64 * 96 + 2 * 64
    assert bytes_as(TensorSpec("w", "F32", (2, 64, 96)), "BF16", "INT4") == 2 * 64 * 96 * 5 // 8
    assert bytes_as(TensorSpec("odd", "F32", (64, 90)), "BF16", "INT4") == 2 * 64 * 90
    assert bytes_as(TensorSpec("norm", "F32", (64,)), "BF16", "INT4") == 2 * 64
    assert bytes_as(TensorSpec("ids", "I64", (64, 64)), "BF16", "INT4") == 8 * 64 * 64


def test_what_is_said() -> None:
    assert Precisions("BF16").said(range(3)) == "BF16"
    assert Precisions("BF16", {1: "INT4", 2: "INT8"}).said(range(4)) == "BF16+INT8+INT4"
    assert Precisions("BF16", {1: "INT4"}).said([1]) == "INT4"
    assert compute_dtype("INT4", "F32") == "BF16"
    assert compute_dtype("auto", "F16") == "F16"
