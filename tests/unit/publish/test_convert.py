from __future__ import annotations

import pytest
import torch

from torrentlm.manifest.canonical import DTYPE_BYTES, TensorSpec
from torrentlm.publish import convert as module
from torrentlm.publish.convert import TORCH_DTYPES, convert, converted


@pytest.mark.parametrize("source", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("target", sorted(TORCH_DTYPES))
def test_as_torch_converts(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    values = torch.randn(1000, dtype=torch.float64).mul(1e3).to(TORCH_DTYPES[source])
    chunks = [memoryview(values[:300].view(torch.uint8).numpy()), memoryview(values[300:].view(torch.uint8).numpy())]
    out = b"".join(bytes(chunk) for chunk in convert(chunks, source, target))
    assert len(out) == 1000 * DTYPE_BYTES[target]
    assert torch.equal(torch.frombuffer(bytearray(out), dtype=TORCH_DTYPES[target]), values.to(TORCH_DTYPES[target]))


def test_integers_keep_their_type() -> None:
    assert converted(TensorSpec("a", "I64", (2,)), "BF16").dtype == "I64"
    assert converted(TensorSpec("a", "F32", (2,)), "BF16").dtype == "BF16"
    assert converted(TensorSpec("a", "F32", (2,)), None).dtype == "F32"
