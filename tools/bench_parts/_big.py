"""A checkpoint of the shape of a 7B model, as large as asked for, with random weights: what `publish` publishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torrentlm.manifest.canonical import TensorSpec, layout, write

HIDDEN, INNER, WORDS = 4096, 11008, 32000
SHARD = 5_000_000_000  # bytes, as transformers cuts them
_POOL = 64 * 1024 * 1024  # random bytes that all weights are cut from, each tensor from other places


def make_checkpoint(folder: Path, size: int) -> int:
    """Write a sharded bf16 checkpoint of about ``size`` bytes, at least one layer, into ``folder``; its true size."""
    layer = sum(spec.nbytes for spec in _layer(0))
    outer = [_spec("model.embed_tokens.weight", WORDS, HIDDEN), _spec("lm_head.weight", WORDS, HIDDEN)]
    layers = max(1, round((size - sum(spec.nbytes for spec in outer)) / layer))
    specs = [outer[0], *(spec for number in range(layers) for spec in _layer(number))]
    specs += [_spec("model.norm.weight", HIDDEN), outer[1]]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(layers)))

    shards = list(_shards(specs))
    values = _Values({spec.name: spec.nbytes for spec in specs})
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb", buffering=0) as file:
            write(layout(shard), values, file.write)
        weight_map |= {spec.name: name for spec in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(spec.nbytes for spec in specs)


def _config(layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": WORDS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def _layer(number: int) -> list[TensorSpec]:
    prefix = f"model.layers.{number}."
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    norms = [_spec(f"{prefix}{name}.weight", HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")]
    return [_spec(f"{prefix}{name}.weight", *shape) for name, shape in shapes.items()] + norms


def _shards(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for spec in specs:
        if shard and sum(each.nbytes for each in shard) + spec.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(spec)
    yield shard


class _Values:
    """Called with a tensor's name: its bytes, normal random numbers of a weight's usual size in bf16."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._random = np.random.default_rng(0)
        values = self._random.standard_normal(_POOL // 2, np.float32) * np.float32(0.02)
        self._pool = memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")

    def __call__(self, name: str) -> Iterator[memoryview]:
        left = self._sizes[name]
        while left:
            at = 2 * int(self._random.integers(_POOL // 4))
            chunk = self._pool[at : at + min(left, _POOL // 2)]
            yield chunk
            left -= len(chunk)
