"""A random model of any small size, with a tokenizer: for benches that are about the network."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_recipe(folder: Path, layers: int, hidden: int) -> Path:
    """Write a checkpoint of ``layers * 7 * hidden**2 * 4`` bytes and a bit, and a model.toml for it; its path."""
    checkpoint = folder / "checkpoint"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(checkpoint)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(checkpoint)
    recipe = folder / "model.toml"
    recipe.write_text('[model]\nname = "Small"\n\n[model.source]\nfolder = "checkpoint"\n')
    return recipe
