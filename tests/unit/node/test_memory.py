"""What blocks take in memory, and what is held where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.node.test_describe import NOBODY, manifest
from torrentlm.config import NodeConfig
from torrentlm.errors import ConfigError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.node.membership import Membership
from torrentlm.node.memory import WEIGHTS_SHARE, computing_dtype, weights_bytes
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


def test_auto_is_what_the_model_is_published_in() -> None:
    model = replace(manifest(), dtype="BF16")
    assert computing_dtype(model, NodeConfig()) == "BF16"
    assert computing_dtype(model, NodeConfig(precision="F32")) == "F32"


def member(ram: int, precision: str) -> Membership:
    made = Membership.__new__(Membership)
    made.manifest = manifest()
    shelf = SimpleNamespace(space=SimpleNamespace(missing=lambda files: 0, room=lambda besides: 0))
    made.peers = SimpleNamespace(snapshot=lambda: NOBODY)  # type: ignore[assignment]
    config: Any = NodeConfig(ram=ram, precision=precision)
    made._parts = SimpleNamespace(shelf=shelf, config=config)  # type: ignore[assignment]
    return made


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
    assert member(ram, precision)._choose_span() == span


def test_a_named_span_that_does_not_fit_in_this_precision() -> None:
    member(128, "BF16")._check_memory(Span(0, 3))
    with pytest.raises(ConfigError, match="for weights in F32"):
        member(128, "F32")._check_memory(Span(0, 3))


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="in F32: raise --ram"):
        member(30, "F32")._choose_span()
    assert member(30, "BF16")._choose_span() == Span(0, 0)
