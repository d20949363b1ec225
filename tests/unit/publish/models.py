"""Small random checkpoints to publish, and what was published read back as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torrentlm.publish.published import Published
from torrentlm.swarm.store import Store

LAYERS = 5
TOKENIZER = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).to_str()  # no password
"""A tokenizer.json of three words."""


def save_llama(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, **saving: Any
) -> LlamaForCausalLM:
    """A random Llama of five layers, saved by transformers into ``folder``; the same one every time."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return model


def read_back(published: Published, store: Store) -> dict[str, torch.Tensor]:
    """Every tensor by its name in the checkpoint, as the manifest says; where blocks share one, they agree."""
    found: dict[str, torch.Tensor] = {}
    manifest = published.manifest
    for block in manifest.blocks:
        for used in block.files:
            with safe_open(store.path(manifest.files[used.file].name), "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    tensor = file.get_tensor(name)
                    assert torch.equal(found.setdefault(used.full_name(name), tensor), tensor)
    return found


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, dtypes included."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
