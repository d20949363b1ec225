"""The sidecar: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.errors import ArtifactError
from torrentlm.manifest.sidecar import (
    MAX_BYTES,
    MAX_HEADER,
    Libraries,
    Outcome,
    Recorded,
    Samples,
    Sidecar,
)

MODEL = bytes(range(32))
F32 = Recorded("F32", (1, 2, 2), bytes(16))
IDS = Recorded("I64", (1, 2), bytes(16))
SAMPLES = Samples((5, 7), {0: (F32,), 3: (F32, IDS)}, Recorded("F32", (3,), b"abcdabcdabcd"), 2)
SIDECAR = Sidecar(
    MODEL,
    Libraries("2.13.0+cpu", "5.23.0", "0.1.0", "x86_64 AVX2"),
    parts=3,
    text=True,
    streamed=False,
    outcomes=(
        Outcome("F32", 0.0, 0.0, 1e-5, 26, 26, 0.0),
        Outcome("BF16", 0.5, 0.01, 0.05, 26, 25, 0.02),
    ),
    samples=(SAMPLES, replace(SAMPLES, encoded=(F32,))),
)


def test_what_goes_in_comes_out() -> None:
    assert Sidecar.from_bytes(SIDECAR.to_bytes(), MODEL) == SIDECAR
    bare = replace(SIDECAR, samples=())
    assert Sidecar.from_bytes(memoryview(bare.to_bytes()), MODEL) == bare


def test_outcomes_say_whether_they_are_exact_and_good() -> None:
    exact, close = SIDECAR.outcomes
    assert (exact.exact, exact.good) == (True, True)
    assert (close.exact, close.good) == (False, True)
    assert not replace(close, max_rel=0.06).good
    assert not replace(close, max_rel=float("inf")).good
    described = SIDECAR.described()
    assert described["transformers"] == "5.23.0" and described["sampled_borders"] == 4
    assert [(row["dtype"], row["exact"]) for row in described["outcomes"]] == [("F32", True), ("BF16", False)]


def test_builds_of_one_version_compute_the_same() -> None:
    cpu, gpu = Libraries("2.13.0+cpu", "5.23.0", "0.1.0", "a"), Libraries("2.13.0+cu130", "5.23.0", "0.2.0", "b")
    assert cpu.decisive == gpu.decisive
    assert replace(cpu, transformers="5.22.0").decisive != cpu.decisive


def test_it_is_bounded() -> None:
    large = Recorded("U8", (MAX_BYTES,), bytes(MAX_BYTES))
    with pytest.raises(ValueError, match="too large"):
        replace(SIDECAR, samples=(replace(SAMPLES, output=large),)).to_bytes()
    with pytest.raises(ArtifactError, match="bytes"):
        Sidecar.from_bytes(bytes(MAX_BYTES + 1), MODEL)


def test_another_models_is_refused() -> None:
    with pytest.raises(ArtifactError, match="another model's"):
        Sidecar.from_bytes(SIDECAR.to_bytes(), bytes(32))


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 100, -17, -1])
def test_cut_short(cut: int) -> None:
    with pytest.raises(ArtifactError):
        Sidecar.from_bytes(SIDECAR.to_bytes()[:cut], MODEL)


def test_nothing_may_follow() -> None:
    for sidecar in (SIDECAR, replace(SIDECAR, samples=())):
        with pytest.raises(ArtifactError):
            Sidecar.from_bytes(sidecar.to_bytes() + b"\0", MODEL)


def with_header(**changes: object) -> bytes:
    data = SIDECAR.to_bytes()
    end = 4 + int.from_bytes(data[:4])
    header = msgpack.packb({**msgpack.unpackb(data[4:end]), **changes})
    return len(header).to_bytes(4) + header + data[end:]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"more": 1},
        {"parts": -1},
        {"parts": True},
        {"text": 1},
        {"outcomes": []},
        {"outcomes": [{"dtype": "F32"}]},
        {"made_with": {"torch": "a\x1b[31m", "transformers": "b", "torrentlm": "c", "processor": "d"}},
        {"made_with": {"torch": "a" * 1000, "transformers": "b", "torrentlm": "c", "processor": "d"}},
        {"samples": [{}] * 3},
        {"samples": [[]]},
        {"samples": [{"tokens": [], "borders": [], "output": ["F32", [0]], "stride": 1, "encoded": []}]},
        {"samples": [{"tokens": [1], "borders": [[0, [["F32", [2**40]]]]], "output": 1, "stride": 1, "encoded": []}]},
        {"samples": [{"tokens": [1], "borders": [], "output": ["C128", [1]], "stride": 1, "encoded": []}]},
    ],
)
def test_nonsense(changes: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        Sidecar.from_bytes(with_header(**changes), MODEL)


def test_a_header_of_many_small_things_is_not_even_read() -> None:
    header = msgpack.packb([[]] * MAX_HEADER)
    with pytest.raises(ArtifactError, match="header is too long"):
        Sidecar.from_bytes(len(header).to_bytes(4) + header, MODEL)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Sidecar.from_bytes(data, MODEL)


@given(st.data())
def test_any_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(SIDECAR.to_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        Sidecar.from_bytes(bytes(whole), MODEL)
    except ArtifactError as error:
        assert "sidecar" in str(error)
