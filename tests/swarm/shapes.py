"""Small random models of any architecture as checkpoints, with a tokenizer of single words, and three processes that
hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Fast

import torrentlm
from tests.e2e.processes import Seed

VOCABULARY = 101
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4},
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
    "jamba": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8, "use_mamba_kernels": False,
    },
}  # fmt: skip


def save(name: str, folder: Path) -> PreTrainedModel:
    """A random model whose greedy tokens vary, saved with a tokenizer that knows the words w0 to w100."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **ids, **SHAPES[name])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Fast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(folder)
    return model


def greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """What transformers adds to ``ids``."""
    given = torch.tensor([ids])
    whole = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in whole[0, -tokens:]]


@contextmanager
def held_by_three(recipe: str, folder: Path) -> Iterator[torrentlm.Model]:
    """A client of three holder processes, each with a third of the blocks from a publisher that is gone by then."""
    with ExitStack() as stack:
        publisher = stack.enter_context(Seed(recipe, folder / "publisher", "--blocks", "none"))
        ready = publisher.wait_for("ready", 240)
        magnet, count = ready["magnet"], ready["blocks_total"]
        cuts = list(pairwise([0, count // 3, 2 * count // 3, count]))
        holders = [
            stack.enter_context(
                Seed(magnet, folder / f"holder-{at}", "--blocks", f"{first}-{stop - 1}", "--threads", "1")
            )
            for at, (first, stop) in enumerate(cuts)
        ]
        said = [holder.wait_for("ready", 240) for holder in holders]
        assert [len(one["blocks"]) for one in said] == [stop - first for first, stop in cuts]
        assert publisher.end() == 0
        client = torrentlm.connect(said[0]["magnet"], data=folder / "client", port=0, dht_bootstrap=["none"])
        yield stack.enter_context(client)


def recipe_for(folder: Path, name: str) -> str:
    """A model.toml beside a checkpoint."""
    path = folder.parent / f"{name}.toml"
    path.write_text(f'[model]\nname = "{name}"\n[model.source]\nfolder = "{folder}"\n')
    return str(path)
