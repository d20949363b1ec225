"""From the hidden states of a text's tokens to one vector, in the way that the model's own files state.

They are those of Sentence Transformers: modules.json lists what follows the model, and each has a folder with a config.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torrentlm.errors import ArtifactError
from torrentlm.wire.tensors import Tensor

Array = npt.NDArray[np.float32]

MAX_JSON = 1 << 20
MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """``modes`` in the order in which their vectors are joined, whether the result has length 1, and the longest text
    in tokens (None: whatever the model takes). Without any files the mean of all tokens.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    limit: int | None = None


def read_pooling(folder: Path) -> Pooling:
    """What the files in ``folder`` state. Raises ArtifactError for files that cannot be understood."""
    modules = _read(folder / "modules.json")
    limit = (_read(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    limit = limit if type(limit) is int and limit > 0 else None
    if modules is None:
        return Pooling(limit=limit)
    modes: tuple[str, ...] = ()
    normalize = False
    for module in modules if isinstance(modules, list) else ():
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        match kind:
            case "Transformer":
                continue
            case "Normalize":
                normalize = True
            case "Pooling":
                modes += _modes(_read(folder / Path(str(module.get("path", ""))).name / "config.json") or {})
            case _:
                raise ArtifactError(
                    f"this model's embeddings go through a {kind or 'nameless'} module, which is not supported"
                )
    return Pooling(modes or ("mean",), normalize, limit)


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    modes = tuple(named) if isinstance(named, list) else (named,) if isinstance(named, str) else ()
    modes = modes or tuple(mode for flag, mode in _FLAGS.items() if config.get(flag) is True)
    if unknown := set(modes) - set(MODES):
        raise ArtifactError(f"this model pools its embeddings by {min(unknown)}, which is not supported")
    return modes


def _read(path: Path) -> Any:
    """The file's JSON, None if there is no such file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ArtifactError(f"{path.name} is far too large for what it should be")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the model's {path.name} cannot be read: publish the model again") from error


def pool(states: Array, lengths: Sequence[int], pooling: Pooling) -> Array:
    """Float32 [rows, width × modes] of ``states``, [rows, tokens, width]; row r has ``lengths[r]`` tokens, then
    padding."""
    inside = np.arange(states.shape[1])[None, :] < np.asarray(lengths)[:, None]
    vectors = np.concatenate([_pooled(mode, states, inside) for mode in pooling.modes], axis=1)
    if pooling.normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(norms, 1e-12)
    return vectors.astype(np.float32)


def _pooled(mode: str, states: Array, inside: npt.NDArray[np.bool_]) -> Array:
    counts = np.maximum(inside.sum(axis=1, keepdims=True), 1)
    pooled: Array
    if mode == "cls":
        pooled = states[:, 0]
    elif mode == "lasttoken":
        pooled = states[np.arange(len(states)), counts[:, 0] - 1]
    elif mode == "max":
        pooled = np.where(inside[:, :, None], states, -np.inf).max(axis=1)
    else:
        weights = inside.astype(np.float32)
        if mode == "weightedmean":
            weights *= np.arange(1, states.shape[1] + 1, dtype=np.float32)
            counts = np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
        elif mode == "mean_sqrt_len":
            counts = np.sqrt(counts)
        pooled = np.einsum("bth,bt->bh", states, weights) / counts
    return pooled


def as_float32(tensor: Tensor) -> Array:
    """A floating point tensor of a message as an array."""
    match tensor.dtype:
        case "BF16":
            bits = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
            values = bits.view(np.float32)
        case "F16":
            values = np.frombuffer(tensor.data, dtype="<f2").astype(np.float32)
        case "F64":
            values = np.frombuffer(tensor.data, dtype="<f8").astype(np.float32)
        case _:
            values = np.frombuffer(tensor.data, dtype="<f4")
    return values.reshape(tensor.shape)
