"""Numbers in a model's config from which on it behaves otherwise, and the config with one of them small.

How many of the earlier tokens each picks, how wide a window is: no proof is as long as that in a large model, but with
a small number in its place a short text shows what a long one would. No such number is known by name: they are those
that no weight's shape depends on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress

import torch
from transformers import PretrainedConfig

from torrentlm.compute.skeleton import build_skeleton
from torrentlm.compute.split import named_weights
from torrentlm.errors import UnsupportedModelError

SMALL = 8
"""Less than each part of the text that is looked at."""
LONGEST = "max_position_embeddings"
"""Limits every session anyway, and the text that is looked at, too."""


def thresholds(config: PretrainedConfig, longer_than: int) -> list[str]:
    """Names of the numbers above ``longer_than`` that no weight's shape depends on: ids of tokens are among them."""
    text = vars(config.get_text_config()).items()
    names = [name for name, value in text if type(value) is int and value > longer_than and name != LONGEST]
    own = _shapes(config) if names else None
    return [name for name in names if _shapes(with_small(config, [name])) == own]


def with_small(config: PretrainedConfig, names: Iterable[str]) -> PretrainedConfig:
    """The config with small numbers there, or as it is where it refuses one."""
    changed = copy.deepcopy(config)
    for name in names:
        with suppress(Exception):  # a config may refuse a value in any way
            setattr(changed.get_text_config(), name, SMALL)
    return changed


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size] | None:
    """Of the model's weights; None where no model comes about."""
    try:
        model = build_skeleton(config, torch.float32)
    except UnsupportedModelError:
        return None
    return {name: weight.shape for name, weight in named_weights(model)}
