"""Change the precision of a stream of weights. Integers and booleans are left as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from torrentlm.manifest.canonical import TensorSpec
from torrentlm.publish.source import CHUNK

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The floating types that can be converted into one another, by safetensors' names."""


def converted(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    """What ``spec`` becomes when the recipe asks for ``dtype`` (None: its own)."""
    return replace(spec, dtype=dtype) if dtype is not None and spec.dtype in TORCH_DTYPES else spec


def convert(chunks: Iterable[memoryview], source: str, target: str) -> Iterator[memoryview]:
    """Chunks of whole elements of dtype ``source`` as chunks of dtype ``target``, rounded to nearest even."""
    if source == target:
        yield from chunks
        return
    for chunk in chunks:
        for at in range(0, len(chunk), CHUNK):
            values = torch.frombuffer(chunk[at : at + CHUNK], dtype=TORCH_DTYPES[source])
            yield values.to(TORCH_DTYPES[target]).view(torch.uint8).numpy().data
