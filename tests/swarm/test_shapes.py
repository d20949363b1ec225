"""Architectures of every kind over three holder processes, against transformers in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.swarm.shapes import SHAPES, greedy, held_by_three, recipe_for, save
from torrentlm.config import load
from torrentlm.errors import RefusedError
from torrentlm.publish.source import locate

PROMPT = [17, 5, 93, 44, 60, 8, 21]
ENCODER = Path(__file__).parents[2] / "torrents" / "all-minilm-l6-v2.toml"


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_transformers_own(name: str, tmp_path: Path) -> None:
    """Twice, so that a session's state does not leak into the next."""
    whole = save(name, tmp_path / "checkpoint")
    expected = greedy(whole, PROMPT, 24)
    prompt = " ".join(f"w{token}" for token in PROMPT)
    with held_by_three(recipe_for(tmp_path / "checkpoint", name), tmp_path) as model:
        for _ in range(2):
            model.generate(prompt, max_new_tokens=24)
            assert model.last is not None
            assert list(model.last.tokens) == expected
        assert len({hop.peer for hop in model.last.route}) == 3
        if whole.config.is_encoder_decoder:
            with pytest.raises(RefusedError, match="no memory of a chat"):
                model.chat()


TEXTS = [
    "A cat sits on the mat.",
    "Where is the nearest railway station, and how do I get there from here without a car?",
    "peer-to-peer",
    "Layers of a model are files in torrents. " * 30,
]


def test_a_real_encoder_embeds_a_batch_of_mixed_lengths(tmp_path: Path) -> None:
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    folder = locate(load(ENCODER).recipe).path  # type: ignore[arg-type]
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = whole(**batch).last_hidden_state
    inside = batch["attention_mask"][:, :, None].float()
    expected = torch.nn.functional.normalize((states * inside).sum(1) / inside.sum(1)).numpy()
    with held_by_three(str(ENCODER), tmp_path) as model:
        vectors = model.embed(texts)
        alone = model.embed(texts[0])
        with pytest.raises(RefusedError, match="torrentlm embed"):
            model.generate("What is a cat?")
    assert vectors.shape == (32, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors * expected).sum(axis=1).min() >= 0.999999
    assert (alone[0] * expected[0]).sum() >= 0.999999
