from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from tests.unit.compute.checkpoints import TINY, tiny
from torrentlm.compute.border import BATCH, TOKENS
from torrentlm.compute.skeleton import build_skeleton, read_config
from torrentlm.compute.split import analyse
from torrentlm.errors import ArtifactError, UnsupportedModelError

COMPUTE = Path(__file__).parents[3] / "torrentlm" / "compute"


def config(model_type: str = "llama", **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **TINY | settings)


def test_parts_and_what_they_read() -> None:
    split = analyse(config())
    assert (split.layer_stack, split.layers) == ("model.layers", 6)
    assert split.stem == ("model.embed_tokens.weight",)
    assert split.head == ("model.norm.weight", "lm_head.weight")
    assert split.extra == ((),) * 6
    assert split.tied == ()
    assert split.cache == "past_key_values"
    assert split.state == (2 * 2 * 8,) * 6
    assert {border.shapes for border in split.borders} == {((BATCH, TOKENS, 32),)}
    assert len(split.borders) == 7


def test_tied_tensors_have_one_name() -> None:
    split = analyse(config(tie_word_embeddings=True))
    assert split.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert split.head == ("model.embed_tokens.weight", "model.norm.weight")


def test_positions_that_the_stem_looks_up_are_its_own() -> None:
    split = analyse(config("gpt2", n_embd=32, n_layer=6, n_head=4))
    assert split.stem == ("transformer.wte.weight", "transformer.wpe.weight")


def test_a_large_model_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    model = build_skeleton(huge, torch.float32)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 6e9
    assert analyse(huge).layers == 8
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9


def test_a_skeleton_reads_as_zeros_and_has_real_tables() -> None:
    model = build_skeleton(config(tie_word_embeddings=True), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.any() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("t5", {}, "ncoder-decoder"),
        ("bart", {}, "ncoder-decoder"),
        ("vit", {}, "causal language model"),
        ("mamba", {}, "state|cache"),
    ],
)
def test_what_cannot_be_split_exactly_is_refused(model_type: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        analyse(AutoConfig.for_model(model_type, **settings))


def test_a_folder_without_a_usable_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UnsupportedModelError, match=r"cannot read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((ArtifactError, UnsupportedModelError)):
        read_config(tmp_path)


def test_no_architecture_is_known_by_name() -> None:
    names = set(CONFIG_MAPPING) - {"beam", "bit"}  # which are words, too
    for source in COMPUTE.glob("*.py"):
        words = set(re.findall(r"[a-z0-9_]+", source.read_text().lower()))
        assert not words & names, source.name
