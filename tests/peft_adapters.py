"""LoRA adapters that peft itself makes, and what peft's merged model says: the reference for ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_adapter(base: Path, target: Path, seed: int = 1, size: float = 0.2, **settings: Any) -> Path:
    """A random adapter for the checkpoint in ``base``, saved by peft into ``target``."""
    torch.manual_seed(seed)
    logging.getLogger("peft").setLevel(logging.ERROR)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, size)  # peft begins with a B of zeros, which changes nothing
    model.save_pretrained(target, save_embedding_layers=False)
    return target


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    """The base with the adapter merged into its weights by peft, fp32."""
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().eval()


def load(base: Path) -> PreTrainedModel:
    """The checkpoint in ``base``, which continues texts or translates them, fp32."""
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(base).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(base, dtype=torch.float32)
