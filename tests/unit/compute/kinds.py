"""Tiny models of every kind that the splitter has to tell apart, and how each is run whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.unit.compute.checkpoints import CAUSAL, MASKED, SEQ2SEQ, tiny

WINDOW = 8


@dataclass(frozen=True)
class Kind:
    """A model type of transformers, made tiny by ``settings``."""

    model_type: str
    auto: Any = CAUSAL
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> PreTrainedModel:
        return tiny(self.model_type, auto=self.auto, **self.settings)


_TWO_WINDOWS = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 101,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_MIXED = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid"]

KINDS = {
    "plain": Kind("llama"),
    "tied": Kind("llama", settings={"tie_word_embeddings": True}),
    "windows": Kind("gemma2", settings={"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "experts": Kind("mixtral"),
    "one module": Kind("albert", MASKED, {"embedding_size": 32, "num_hidden_groups": 1, "inner_group_num": 1}),
    "parallel lists": Kind("xlm", MASKED, {"emb_dim": 32, "n_layers": 3, "n_heads": 4}),
    "shared modules": Kind("zamba", settings={"layers_block_type": _MIXED, "n_mamba_heads": 2, "mamba_dt_rank": 8}),
    "per layer": Kind(
        "gemma3n_text",
        settings={"intermediate_size": 64, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6, **_TWO_WINDOWS},
    ),
    "shared states": Kind("gemma4_text", settings={"global_head_dim": 8, **_TWO_WINDOWS}),
    "state space": Kind("mamba", settings={"state_size": 16, "time_step_rank": 8}),
    "encoder": Kind("bert", MASKED),
    "two sides": Kind("t5", SEQ2SEQ, {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_decoder_layers": 3}),
}


def ids(batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Random token ids [batch, tokens] that stand for nothing special."""
    return torch.randint(3, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def mask_of(pads: tuple[int, ...], tokens: int) -> torch.Tensor:
    """What ``generate`` would be given for such paddings: int64 [batch, tokens]."""
    steps = torch.arange(tokens)[None]
    left = torch.tensor(pads)[:, None]
    return ((steps >= left) & (steps < tokens + left.clamp(max=0))).long()
