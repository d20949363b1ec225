"""Finds where a model can be cut: tries its lists of layers, and takes the cut that wastes the least.

No architecture is known by name; hints say what looking at the model does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from torrentlm.compute.analysis import Analysis
from torrentlm.compute.inputs import FILLER, Inputs
from torrentlm.compute.skeleton import GhostProducts, build_skeleton, first_line
from torrentlm.compute.split import Hints, Split, named_weights
from torrentlm.compute.stack import Stack, find_stacks
from torrentlm.errors import UnsupportedModelError

_NO_HINTS = Hints()


def analyse(config: PretrainedConfig, hints: Hints = _NO_HINTS) -> Split:
    """The one split of a model that is no encoder-decoder. Raises as ``analyse_sides``."""
    sides = analyse_sides(config, hints)
    if len(sides) > 1:
        raise UnsupportedModelError("An encoder-decoder has two sides, which are split each by itself.")
    return sides[0]


def analyse_sides(config: PretrainedConfig, hints: Hints = _NO_HINTS) -> tuple[Split, ...]:
    """Find the split of the model that ``config`` describes, of an encoder-decoder the encoder's and the decoder's;
    needs no weights and next to no memory.

    Raises UnsupportedModelError, with the reason, for a model that cannot be cut exactly by these rules.
    """
    model = build_skeleton(config, torch.float32)
    if len(hints.layer_stacks) > 1 + bool(model.config.is_encoder_decoder):
        raise UnsupportedModelError("layer_stacks has an entry for the model, or two for an encoder and a decoder.")
    if not model.config.is_encoder_decoder:
        inputs = Inputs.of(model, causal=bool(model.can_generate()) and not hints.encoder)
        if not inputs.causal and isinstance(getattr(_made_by(model), "logits", None), torch.Tensor):
            inputs = replace(inputs, output="logits")
        return (_best(model, "", inputs, _hinted(find_stacks(model), hints, 0), None, hints),)
    encoder = model.get_encoder()
    path = next((path for path, module in model.named_modules() if module is encoder), "")
    if not path:
        raise UnsupportedModelError("The model has an encoder that is no part of it by itself.")
    stacks = _hinted(find_stacks(model, path), hints, 0)
    first = _best(model, path, Inputs.of_encoder(encoder), stacks, None, hints)
    made = _made_by(encoder)
    stacks = [stack for stack in find_stacks(model) if not any(part.startswith(f"{path}.") for part in stack.paths)]
    inputs = replace(Inputs.of_decoder(model), encoded=type(made))
    return first, _best(model, "", inputs, _hinted(stacks, hints, 1), made.last_hidden_state.shape[-1], hints)


def _hinted(stacks: list[Stack], hints: Hints, side: int) -> list[Stack]:
    if side >= len(hints.layer_stacks):
        return stacks
    found = [stack for stack in stacks if stack.path == hints.layer_stacks[side]]
    if not found:
        known = ", ".join(stack.path for stack in stacks)
        raise UnsupportedModelError(f"There is no list of layers {hints.layer_stacks[side]}; there are {known}.")
    return found


def _made_by(module: nn.Module) -> Any:
    """What a module makes of a short text."""
    try:
        with torch.no_grad(), GhostProducts(module):
            return module(input_ids=torch.full((1, 7), FILLER), return_dict=True)
    except Exception as error:  # any model's own code runs here
        raise UnsupportedModelError(f"The model's forward fails without weights: {first_line(error)}") from error


def _best(
    model: PreTrainedModel, module: str, inputs: Inputs, stacks: Sequence[Stack], width: int | None, hints: Hints
) -> Split:
    """The split at the stack that leaves the least to be run twice; the largest stack where several are equal."""
    found: list[tuple[int, Split]] = []
    problem: UnsupportedModelError | None = None
    for stack in stacks:
        for with_cache in (True, False) if inputs.causal and not hints.replay else (False,):
            try:
                split = Analysis(model, module, inputs, stack, width, with_cache).split()
                split = replace(split, chunks=split.chunks and (hints.chunks or not inputs.causal))
            except UnsupportedModelError as error:
                problem = error if problem is None or not with_cache else problem
                continue
            found.append((_waste(model, split), split))
            break
        if found and found[-1][0] == 0:
            break
    if not found:
        raise problem or UnsupportedModelError("This side of the model has no list of layers to cut it at.")
    return min(found, key=lambda entry: entry[0])[1]


def _waste(model: nn.Module, split: Split) -> int:
    """How many numbers the layers' blocks hold more than once, or have to compute with outside of their layers; more
    than any of that where there is no cache.
    """
    sizes = {name: weight.numel() for name, weight in named_weights(model)}
    needed: dict[str, set[str]] = {}  # by module: what is called more than once is needed more than once by nature
    for call, extra in zip(split.calls, split.extra, strict=True):
        own = {name for name in sizes if name.startswith(f"{call.path}.")}
        needed.setdefault(call.path, set()).update(own, extra)
    twice = sum(sizes[name] for names in needed.values() for name in names)
    twice -= sum(sizes[name] for name in set().union(*needed.values()))
    glue = sum(sizes[name] for extra in split.extra for name in extra)
    return twice + glue + (sum(sizes.values()) if split.replays and split.inputs.causal else 0)
