"""Makes any of transformers' configs small, by looking at the names and the values of its fields.

No architecture is known by name here: a rule is about what a field is called ("..._heads"), wherever it occurs. What
these rules get wrong for one family stands in ``overrides.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 101
SPECIAL_IDS = range(90, VOCABULARY)
"""Ids of images and the like; prompts are made of smaller ones."""
LAYERS, SIDE_LAYERS, OTHER_LAYERS = 6, 3, 2
"""Of a decoder; of each side of an encoder-decoder; of what looks at images or listens to sounds."""
WINDOW = 8

# The first rule whose pattern is found in the field's name decides; None leaves the field as it is.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"^pad_token_id|^pad_index", 0),
    (r"^(bos|decoder_start)_token_id|^bos_index", 1),
    (r"eos_token_id|^eos_index", 2),
    (r"type_vocab|langs|chunk_size_feed_forward|num_labels|num_classes", None),
    (r"vocab", VOCABULARY),
    (r"num_(shared|local|global|sparse|dense)_.*layers$|(kv_shared|dense|global|nextn).*layers$|dense_replace", 1),
    (r"^max_window_layers$", 2),
    (r"(layer|pattern|freq|interval|period|sparse_step|every_n|every).*"
     r"(pattern|interval|period|step|freq|layers|size)$", 3),
    (r"_pattern$|_interval$|_period$", 3),
    (r"(relative|rotary|position).*(buckets|base)|num_buckets", None),
    (r"position|max_seq|seq_len|^n_ctx$|n_positions|max_length|context_length|max_.*distance", 128),
    (r"window|^local_attention$|local_radius", WINDOW),
    (r"(kv|key_value|value|key|v|k)_?(n_)?heads?$|n_head_kv|query_group", 2),
    (r"heads?$|n_heads$|_heads_", 4),
    (r"experts?_per_tok|experts_per_token|moe_k$|top_k$|topk$|moe_topk|num_selected", 2),
    (r"topk_group", 1),
    (r"n_group$|expert_group", 2),
    (r"shared_experts$", 1),
    (r"experts$|expert_num$", 4),
    (r"(^|_)n_?groups$", 2),
    (r"groups$|num_blocks$", None),
    (r"num_self_attends", LAYERS),
    (r"(head_?dim|dim_head|d_head|d_kv|rope_dim|rotary_dim)", 8),
    (r"rank$", 8),
    (r"state|d_conv|kernel", None),
    (r"d_?ff$|ffn|intermediate|mlp_dim|inner|hidden_dim|ff_dim|expert.*size", 64),
    (r"hidden|d_model|n_?embd?|^dim$|emb(edding)?_?(dim|size)|width$|proj_dim|d_embed|d_latents", 32),
    (r"(left|right)_context", 2),
    (r"chunk|block_size", 8),
    (r"patch", None),
)  # fmt: skip
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 8, "num_key_value_heads": 2},
    {"head_dim": 16, "num_hidden_layers": 4},
)
"""Values that are tried one after the other where a config or a model does not come about."""
LAYER_COUNTS = re.compile(r"^(n|num)_(hidden_|encoder_|decoder_)?(layers?|blocks)$|^(en|de)coder_layers$|^depth$")
SENSES = re.compile(r"vision|image|audio|speech|sound|video|acoustic|semantic|vq|codec|perceptual")
SPECIAL = re.compile(r"_(token_id|token_index|token|id|index)$")
LARGE = 64


class NoConfig(Exception):
    """transformers makes no config of this kind from small numbers; says why."""


@cache
def overrides() -> dict[str, dict[str, Any]]:
    """Per model type, the fields that the rules get wrong; see ``overrides.json``."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("overrides.json").read_text())
    return found


def tiny_configs(model_type: str, **fixed: Any) -> Iterator[PretrainedConfig]:
    """Small configs of one type, the most fitting first; raises NoConfig when there is none at all.

    ``fixed`` are values for the fields of these names, where the type has them.
    """
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(kind)}
    given = {name: value for name, value in fixed.items() if name in known} | overrides().get(model_type, {})
    made = 0
    errors: list[str] = []
    for attempt in ATTEMPTS:
        try:
            shrunk = _merged(_shrink(kind, None, "", attempt), given)
            config = kind(**shrunk)
        except Exception as error:  # any config's own checks run here
            errors.append(_said(error))
            continue
        made += 1
        yield config
    if not made:
        raise NoConfig(errors[0])


def _shrink(
    kind: type[PretrainedConfig], default: PretrainedConfig | None, path: str, attempt: dict[str, Any]
) -> dict[str, Any]:
    """The fields of ``kind`` that must change for it to be small."""
    default = default or _default(kind)
    small: dict[str, Any] = {}
    for name in _names(kind, default, attempt):
        value = vars(default).get(name)
        if isinstance(value, PretrainedConfig):
            small[name] = _shrink(type(value), value, f"{path}.{name}", attempt)
            if type(value).model_type != kind.model_type:
                small[name]["model_type"] = type(value).model_type
        elif (new := _small(name, value, path, default, attempt)) != value:
            small[name] = new
    return small


def _names(kind: type[PretrainedConfig], default: PretrainedConfig, attempt: dict[str, Any]) -> list[str]:
    """What the constructor is told: the class's own fields; those it works out by itself when unset are left to it."""
    own = []
    for field in fields(kind):
        unset = field.default is None and not isinstance(vars(default).get(field.name), PretrainedConfig)
        derived = unset or (field.default is MISSING and field.default_factory is MISSING)
        if not derived or field.name == "pad_token_id" or field.name in attempt:
            own.append(field.name)
    return own


def _default(kind: type[PretrainedConfig]) -> PretrainedConfig:
    try:
        return kind()
    except Exception as error:
        raise NoConfig(_said(error)) from error


def _small(name: str, value: Any, path: str, config: PretrainedConfig, attempt: dict[str, Any]) -> Any:
    if isinstance(value, bool | str):
        return value
    if name in attempt and (value is None or isinstance(value, int)):
        return attempt[name]
    if isinstance(value, int):
        return _small_number(name, value, path, config)
    if isinstance(value, list | tuple) and value:
        return _small_list(name, list(value))
    if name == "pad_token_id":
        return 0
    return value


def _small_number(name: str, value: int, path: str, config: PretrainedConfig) -> int:
    if value <= 0:
        return value
    if LAYER_COUNTS.search(name):
        wanted = OTHER_LAYERS if SENSES.search(path) else SIDE_LAYERS if config.is_encoder_decoder else LAYERS
        return wanted if value > 1 else value
    if SENSES.search(name) and SPECIAL.search(name):
        return SPECIAL_IDS[sum(name.encode()) % len(SPECIAL_IDS)]
    for pattern, small in RULES:
        if re.search(pattern, name):
            if name == "vocab_size":
                return VOCABULARY
            return value if small is None else min(value, small)
    if SPECIAL.search(name):
        return value if value < VOCABULARY else SPECIAL_IDS[sum(name.encode()) % len(SPECIAL_IDS)]
    return value if value <= LARGE else 16


def _small_list(name: str, value: list[Any]) -> list[Any]:
    """One entry per layer becomes fewer, each kind of entry still there; lists of layers lose those that are gone."""
    if name == "eos_token_id":
        return [2]
    if len(value) >= LAYERS and all(isinstance(item, str) for item in value):
        kinds = list(dict.fromkeys(value))
        return [kinds[layer * len(kinds) // LAYERS] for layer in range(LAYERS)]
    if re.search(r"layers|idx|indices|indexes|layer_ids", name) and all(isinstance(item, int) for item in value):
        if set(value) <= {0, 1}:
            return value[:LAYERS]
        return [item for item in value if item < LAYERS]
    return value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
