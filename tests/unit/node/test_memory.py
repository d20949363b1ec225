"""What blocks take in memory, and what is held where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from tests.unit.node.test_describe import NOBODY, manifest
from torrentlm.compute.precision import Cost
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.node.membership import Membership
from torrentlm.node.memory import WEIGHTS_SHARE, weights_bytes
from torrentlm.node.precisions import NOT_ASKED
from torrentlm.records import Span


def test_floating_tensors_count_in_the_dtype_that_is_computed_in() -> None:
    mixed = canonical.layout(
        [
            TensorSpec("w", "BF16", (10, 3)),
            TensorSpec("norm", "F32", (4,)),
            TensorSpec("scale", "F8_E4M3", (2,)),
            TensorSpec("ids", "I64", (5,)),
            TensorSpec("mask", "BOOL", ()),
            TensorSpec("none", "F64", (0, 9)),
        ]
    )
    model = replace(manifest(), layouts=(manifest().layouts[0], mixed))
    names = [file.name for file in model.files]
    assert weights_bytes(model, "F32") == dict(zip(names, (24, 144 + 41, 144 + 41, 24), strict=True))
    assert weights_bytes(model, "BF16") == dict(zip(names, (12, 72 + 41, 72 + 41, 12), strict=True))


def member(ram: int, precision: str, blocks: Span | str = "auto") -> Membership:
    made = Membership.__new__(Membership)
    made.manifest = manifest()
    shelf = SimpleNamespace(space=SimpleNamespace(missing=lambda files: 0, room=lambda besides: 0))
    made.peers = SimpleNamespace(snapshot=lambda: NOBODY)  # type: ignore[assignment]
    config: Any = NodeConfig(ram=ram, precision=precision, blocks=blocks)
    made._parts = SimpleNamespace(shelf=shelf, config=config, say=SAID.append)  # type: ignore[assignment]
    return made


SAID: list[dict[str, Any]] = []


def chosen(member: Membership, *, asked: bool) -> Span | None:
    """What it chooses, and whether it had to ask what the device can do."""
    asks = []

    async def ask(measure: bool) -> Mapping[str, Cost]:
        asks.append(True)
        return NOT_ASKED

    SAID.clear()
    span = trio.run(member.choose, None, ask)
    assert bool(asks) == asked
    return span


# Bytes in F32: stem 24, each layer 24 + 48, head 24 + the stem's file; in BF16 half of that.
@pytest.mark.parametrize(
    ("weights", "precision", "span"),
    [
        (192, "F32", Span(0, 3)),
        (191, "F32", Span(0, 2)),
        (96, "F32", Span(0, 1)),
        (96, "BF16", Span(0, 3)),
        (95, "BF16", Span(0, 2)),
    ],
)
def test_the_span_that_fits_in_this_precision(weights: int, precision: str, span: Span) -> None:
    ram = -int(-weights // WEIGHTS_SHARE)
    assert chosen(member(ram, precision), asked=precision != "F32") == span
    assert not SAID


def test_a_named_span_that_does_not_fit_in_this_precision() -> None:
    assert chosen(member(128, "BF16", Span(0, 3)), asked=True) == Span(0, 3)
    with pytest.raises(ConfigError, match="for weights in F32"):
        chosen(member(128, "F32", Span(0, 3)), asked=True)


def test_a_named_span_is_kept_in_less_where_the_budget_is_named_and_only_there() -> None:
    small = member(255, "auto", Span(0, 3))
    assert chosen(small, asked=True) == Span(0, 3)
    assert small.precisions.compute == "BF16"
    assert [event["precision"] for event in SAID] == ["BF16"]
    large = member(256, "auto", Span(0, 3))
    assert chosen(large, asked=False) == Span(0, 3)
    assert large.precisions.compute == "F32" and not SAID
    with pytest.raises(ConfigError, match=r"--blocks 0-3 needs at least 0\.0 MB for weights in BF16"):
        chosen(member(100, "auto", Span(0, 3)), asked=True)


def test_one_that_is_chosen_is_as_published_where_a_block_fits() -> None:
    large = member(128, "auto")
    assert chosen(large, asked=False) == Span(0, 1)
    assert large.precisions.compute == "F32" and not SAID
    small = member(30, "auto")
    assert chosen(small, asked=True) == Span(0, 0)
    assert small.precisions.compute == "BF16"
    assert SAID[0]["why"].endswith("held instead: block 0 in BF16, 0.0 MB")


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"in F32: raise --ram to 0\.1 MB"):
        chosen(member(30, "F32"), asked=False)
    with pytest.raises(ConfigError, match="in BF16: raise --ram"):
        chosen(member(10, "auto"), asked=True)
    assert chosen(member(30, "BF16"), asked=True) == Span(0, 0)
