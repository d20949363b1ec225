"""A config alone as a source: random weights that depend on nothing but the config, the seed and each tensor's name.

For trying out shapes: what is published so answers nonsense, at the speed and size of the real model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from torrentlm.compute.border import DTYPE_NAMES
from torrentlm.compute.skeleton import build_skeleton, read_config
from torrentlm.compute.split import named_weights
from torrentlm.errors import ArtifactError
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.publish.payload import tidy
from torrentlm.publish.source import CHUNK, unreadable

SCALE = 0.02
"""Standard deviation of matrices, as most models begin with; vectors are ones, give or take as much."""
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class RandomWeights:
    """The model that ``config``, a config.json, describes, in ``dtype`` (a safetensors name) or the config's own."""

    def __init__(self, config: Path, seed: int, dtype: str | None) -> None:
        self._config = config
        self._seed = seed
        self._given = dtype

    @cached_property
    def _dtype(self) -> str:
        """What was asked for, else what the config says."""
        said = getattr(read_config(self._config.parent), "dtype", None)
        names = {kind: name for name, kind in FLOATS.items()}
        return self._given or (names.get(said, "F32") if isinstance(said, torch.dtype) else "F32")

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        skeleton = build_skeleton(read_config(self._config.parent), torch.float32)
        specs: dict[str, TensorSpec] = {}
        seen: set[int] = set()
        for name, weight in named_weights(skeleton):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            dtype = self._dtype if weight.is_floating_point() else DTYPE_NAMES[weight.dtype]
            specs[name] = TensorSpec(name, dtype, tuple(weight.shape))
        return specs

    def read(self, name: str) -> Iterator[memoryview]:
        spec = self.tensors[name]
        left = math.prod(spec.shape)
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little")))
        middle = 1.0 if len(spec.shape) == 1 and name.endswith("weight") else 0.0
        while left:
            count = min(left, CHUNK // 4)
            left -= count
            if spec.dtype not in FLOATS:
                yield memoryview(bytes(spec.nbytes * count // math.prod(spec.shape)))
                continue
            values = torch.from_numpy(generator.standard_normal(count, dtype=np.float32)).mul_(SCALE).add_(middle)
            yield values.to(FLOATS[spec.dtype]).view(torch.uint8).numpy().data

    def files(self) -> Mapping[str, bytes]:
        try:
            settings = tidy("config.json", self._config.read_bytes())
        except OSError as error:
            raise unreadable(self._config, error) from error
        if not isinstance(json.loads(settings), dict):
            raise ArtifactError(f"{self._config} is no config of a model")
        return {"config.json": settings}
