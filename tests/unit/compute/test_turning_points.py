"""Lengths at which a model does something else than before: other rotary tables, states that hold more than keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.compute.checkpoints import Chain, cut, greedy, tiny
from torrentlm.errors import RefusedError

BORDER = 40
LONG = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": BORDER,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": BORDER,
    },
}


def text(tokens: int) -> torch.Tensor:
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def test_longer_tables_from_the_start_and_never_silently_in_between(tmp_path: Path) -> None:
    model = tiny("phi3", **LONG)
    runners = cut(model, tmp_path).thirds()
    long, short = text(BORDER + 10), text(BORDER - 4)
    assert torch.equal(Chain(runners, 1, 100).greedy(long, 12), greedy(model, long, 12))
    chain = Chain(runners, 1, 100)
    assert torch.equal(chain.greedy(short, 4), greedy(model, short, 4))
    with pytest.raises(RefusedError, match="all of the text anew") as refused:
        chain.greedy(text(1), 4)
    assert refused.value.code == "max_length"


def test_a_state_of_a_models_own_kind_goes_back(tmp_path: Path) -> None:
    """Its layers keep more than keys and values, which ``crop`` would leave as it is."""
    settings = {"sliding_window": 32, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2}
    model = tiny("deepseek_v4", hidden_size=32, num_experts_per_tok=2, n_routed_experts=4, **settings)
    runners = cut(model, tmp_path).thirds()
    prompt, rest = text(5), text(9)
    whole = Chain(runners, 1, 64)
    whole.step(prompt)
    expected = [whole.step(rest[:, at : at + 1]) for at in range(9)]
    chain = Chain(runners, 1, 64)
    chain.step(prompt)
    for at in range(2):
        chain.step(rest[:, at : at + 1])
    chain.trim(5)
    found = [chain.step(rest[:, at : at + 1]) for at in range(9)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
