"""Small random GGUF files, written by the gguf package, for the names and shapes of a tiny model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

HIDDEN, INNER, LAYERS, VOCABULARY, EXPERTS = 64, 96, 2, 40, 4
"""Rows of a multiple of 32 elements, so that they can be quantized."""
EXPERT_INNER = 768
"""The default of transformers, which does not read this length from a file."""

DENSE = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
}
FEED_FORWARD = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
LAYER_TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": DENSE | FEED_FORWARD,
    "gemma2": DENSE | FEED_FORWARD | {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)},
    "qwen3moe": DENSE
    | {
        "attn_q_norm": (HIDDEN // 4,),
        "attn_k_norm": (HIDDEN // 4,),
        "ffn_gate_inp": (EXPERTS, HIDDEN),
        "ffn_gate_exps": (EXPERTS, EXPERT_INNER, HIDDEN),
        "ffn_up_exps": (EXPERTS, EXPERT_INNER, HIDDEN),
        "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_INNER),
    },
}


def write_gguf(path: Path, architecture: str, kind: GGMLQuantizationType, alignment: int = 32) -> None:
    """A model of ``architecture`` whose matrices are stored as ``kind``; vectors are fp32, as llama.cpp writes them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(HIDDEN // 4)
    writer.add_value_length(HIDDEN // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    if "moe" in architecture:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERT_INNER)
    writer.add_array("test.words", ["a", "bc", ""])
    writer.add_custom_alignment(alignment)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    if architecture != "gemma2":  # always tied
        shapes["output"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in LAYER_TENSORS[architecture].items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        stored = kind if len(shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
