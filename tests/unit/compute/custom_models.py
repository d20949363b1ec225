"""A tiny checkpoint whose classes lie beside it: a decoder that transformers does not know."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 97

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-decoder"

    def __init__(self, gain=1.5, **kwargs):
        self.gain = gain
        super().__init__(**kwargs)
"""
PARTS = """
from torch import nn


class Gained(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gain = config.gain

    def forward(self, x):
        return self.down(self.up(x).tanh() * self.gain)
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .parts import Gained


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Gained(config)
        self.post_init()
"""
FILES = {"configuration_own.py": CONFIGURATION, "parts.py": PARTS, "modeling_own.py": MODELING}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


_numbers = itertools.count()


def save(folder: Path, vocabulary: int = VOCABULARY) -> Any:
    """Write the checkpoint with its code; returns the model, made by the same code as a plain package."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "unrelated.py").write_text("raise SystemExit('nobody imports this')")
    package = _import(folder, f"own_{next(_numbers)}")
    config = package.configuration_own.OwnConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        architectures=["OwnForCausalLM"],
    )
    torch.manual_seed(2)
    model = package.modeling_own.OwnForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    change_config(folder, auto_map=AUTO_MAP)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _import(folder: Path, name: str) -> Any:
    """The folder as a package, without the loader that is tested."""
    spec = importlib.util.spec_from_loader(name, None, is_package=True)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    for module in ("configuration_own", "parts", "modeling_own"):
        importlib.import_module(f"{name}.{module}")
    return package
