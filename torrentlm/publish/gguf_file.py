"""A GGUF file as a source: dequantized tensor by tensor, under the names and shapes that transformers' model has.

Which GGUF tensor becomes which parameter, and what must be undone (llama.cpp permutes the rows of some projections,
shifts some norms, stacks experts), is transformers' knowledge: its name map and tensor processors are used as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize, quant_shape_to_byte_shape
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from torrentlm.compute.skeleton import build_skeleton
from torrentlm.compute.split import named_weights
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.publish.gguf_directory import Stored, read_directory
from torrentlm.publish.payload import is_payload, tidy, to_json
from torrentlm.publish.source import CHUNK, read_exactly

_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


class GGUFFile:
    """The GGUF file at ``path``. Every tensor comes out as fp32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        architecture, stored = read_directory(path)
        self._settings = self._read_settings()
        config = _config(self._settings)
        model = build_skeleton(config, torch.float32)
        self._processor: TensorProcessor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._settings)
        self._parameters: dict[str, str] = get_gguf_hf_weights_map(_Tree(model, 2), self._processor)
        self._stored: dict[str, list[Stored]] = {}
        for tensor in stored:
            target = self._parameters.get(tensor.name) or self._parameters.get(tensor.name.removesuffix(".weight"))
            self._stored.setdefault(target or tensor.name, []).append(tensor)
        shapes = {name: tuple(weight.shape) for name, weight in named_weights(model)}
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, "F32", shapes.get(name, parts[0].shape)) for name, parts in self._stored.items()
        }

    def read(self, name: str) -> Iterator[memoryview]:
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in self._stored[name]:
            result = self._processor.process(
                weights=self._dequantized(tensor),
                name=tensor.name,
                tensor_key_mapping=self._parameters,
                parsed_parameters=parsed,
            )
            if result.name is not None:
                parameter = self._parameters.get(result.name, result.name)
                parsed["tensors"][parameter] = torch.from_numpy(np.ascontiguousarray(result.weights))
        value = parsed["tensors"].pop(name, None)
        expected = self.tensors[name].shape
        if value is None or parsed["tensors"] or tuple(value.shape) != expected:
            shape = "no tensor" if value is None else f"shape {tuple(value.shape)}"
            raise ArtifactError(
                f"{self._path} gives {shape} for {name}, the model has {expected}; use another GGUF file"
            )
        if value.dtype != torch.float32:
            raise ArtifactError(f"{self._path} gives {value.dtype} for {name}, not fp32; use another GGUF file")
        yield value.contiguous().numpy().data.cast("B")

    def files(self) -> Mapping[str, bytes]:
        generation = {key: self._settings[key] for key in _GENERATION_KEYS if self._settings.get(key) is not None}
        found = {"config.json": tidy("config.json", to_json(self._settings)), **self._tokenizer()}
        if generation:
            found["generation_config.json"] = to_json(generation)
        return found

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings: dict[str, Any] = load_gguf_checkpoint(str(self._path))["config"]
        except Exception as error:  # a foreign parser on a foreign file
            raise UnsupportedModelError(
                f"transformers cannot read {self._path} ({error}); use another GGUF file"
            ) from error
        return settings

    def _tokenizer(self) -> dict[str, bytes]:
        """The tokenizer's files, chat template included, as transformers saves them."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._path.parent, gguf_file=self._path.name, local_files_only=True, trust_remote_code=False
            )
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                saved = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
        except Exception as error:  # the same
            raise UnsupportedModelError(
                f"transformers makes no tokenizer from {self._path} ({error}); publish a Hugging Face folder instead"
            ) from error
        return {name: tidy(name, content) for name, content in saved.items() if is_payload(name)}

    def _dequantized(self, tensor: Stored) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The whole tensor in fp32, made a few rows at a time from bounded reads: the file is not mapped."""
        out = np.empty(tensor.shape, np.float32)
        rows = out.reshape(-1, tensor.shape[-1]) if tensor.shape else out.reshape(1, 1)
        row_bytes = quant_shape_to_byte_shape(rows.shape, tensor.kind)[-1]
        step = max(1, CHUNK // (4 * rows.shape[1]))
        for first in range(0, len(rows), step):
            count = min(step, len(rows) - first)
            raw = b"".join(read_exactly(self._path, tensor.start + first * row_bytes, count * row_bytes))
            try:
                rows[first : first + count] = dequantize(
                    np.frombuffer(raw, np.uint8).reshape(count, row_bytes), tensor.kind
                )
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self._path} holds {tensor.name} as {tensor.kind.name}: {error}"
                ) from error
        return out


class _Tree:
    """A model as transformers' name map looks at it, down to a depth: it builds a large table per module it meets.

    Names that only show deeper down would be missed, and then publishing refuses the file for lacking a tensor.
    """

    def __init__(self, module: nn.Module, depth: int) -> None:
        self.config = getattr(module, "config", None)
        self.state_dict = module.state_dict
        self._children = [(name, _Tree(child, depth - 1)) for name, child in module.named_children() if depth]

    def named_children(self) -> list[tuple[str, _Tree]]:
        return self._children


def _config(settings: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(**settings)
    except (KeyError, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"transformers does not know this GGUF file's architecture ({error})") from error
