"""How much memory a node may use, from its settings and the machine, and how much blocks take.

The budget ``vram`` is for an accelerator's memory; blocks are computed on the processor, and it decides nothing here.
"""

from __future__ import annotations

import math

from torrentlm.compute.machine import available_memory
from torrentlm.config import NodeConfig
from torrentlm.manifest.adapter import AdapterManifest
from torrentlm.manifest.canonical import DTYPE_BYTES, FLOATING, TensorSpec
from torrentlm.manifest.manifest import Manifest

WEIGHTS_SHARE = 0.75
"""Of the memory budget; the rest is for KV-caches."""
MACHINE_SHARE = 0.6
"""Of the memory that is available at the start, where no budget is configured."""


def budget(config: NodeConfig) -> int:
    return int(available_memory() * MACHINE_SHARE) if config.ram is None else config.ram


def weights_budget(config: NodeConfig) -> int:
    return int(budget(config) * WEIGHTS_SHARE)


def computing_dtype(manifest: Manifest, config: NodeConfig) -> str:
    """Safetensors' name of what this node computes the model in."""
    return manifest.dtype if config.precision == "auto" else config.precision


def weights_bytes(manifest: Manifest | AdapterManifest, dtype: str) -> dict[str, int]:
    """What each file takes in memory when ``dtype`` is computed in, in bytes, by the file's name.

    Weights that need no conversion are mapped, not copied. They count all the same: every step reads all of them, so
    their pages have to stay.
    """
    in_memory = [sum(_bytes_as(spec, dtype) for spec in layout.specs) for layout in manifest.layouts]
    return {file.name: in_memory[file.layout] for file in manifest.files}


def _bytes_as(spec: TensorSpec, dtype: str) -> int:
    return math.prod(spec.shape) * DTYPE_BYTES[dtype if spec.dtype in FLOATING else spec.dtype]


def kv_budget(config: NodeConfig) -> int:
    return budget(config) - weights_budget(config)
