"""How a model is cut, as plain data: its layer calls, what each part reads, what travels between them, and the state.

A *part* of a model is the stem (what runs from the token ids to the first layer call), a layer call with the glue
before it, or the head (what follows the last call). A *border* is what a part needs of all the parts before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from torrentlm.compute.border import BorderShape, Carried, TensorShape
from torrentlm.compute.inputs import Inputs
from torrentlm.compute.probe import MapEntry
from torrentlm.compute.values import Place


@dataclass(frozen=True, slots=True)
class Call:
    """One layer call: its module's path, the form of what it returns, the maps that it writes to, and the tensors in
    both.
    """

    path: str
    form: Any
    maps: tuple[MapEntry, ...]
    tensors: tuple[TensorShape, ...]


@dataclass(frozen=True, slots=True)
class CarriedValue:
    """A value that the stem makes for layer calls: which arguments of which calls it is, and its shape."""

    slot: Carried
    places: tuple[tuple[int, Place], ...]
    shape: TensorShape


@dataclass(frozen=True, slots=True)
class State:
    """What a call keeps: the cache's entries that it writes to, and how many numbers per row and token, per row and
    token that an encoder has read, and per row. ``trims``: whether it can be cut at any token; ``window``: how many
    tokens are kept, None for all.
    """

    entries: tuple[int, ...] = ()
    per_token: int = 0
    per_source: int = 0
    per_row: int = 0
    trims: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Split:
    """How one model is cut into the stem, its layer calls and the head. Parameter names are the module tree's own.

    ``module`` is the path of what is run, "" for the whole model. ``chunks``: whether a prompt may come in parts, and
    more than one token behind it at once.
    ``width``: of the encoder's hidden states that a decoder is given. ``calls`` are the layer calls in order; a module
    may be called more than once. ``stem``, ``head`` and ``extra`` (one entry per call) name what the part reads besides
    the weights under ``layer_prefix(call)``; persistent buffers count as weights. ``tied`` pairs each alias with the
    canonical name of the same parameter; every other field uses canonical names. ``borders[k]`` is what travels into
    call k, ``borders[layers]`` what travels into the head.

    ``make_cache`` makes an empty cache of the model's own kind; None where every step replays the text.
    """

    module: str
    layer_stack: str
    calls: tuple[Call, ...]
    stem: tuple[str, ...]
    head: tuple[str, ...]
    extra: tuple[tuple[str, ...], ...]
    tied: tuple[tuple[str, str], ...]
    inputs: Inputs
    make_cache: Callable[[PretrainedConfig], Cache] | None
    state: tuple[State, ...]
    carried: tuple[CarriedValue, ...]
    borders: tuple[BorderShape, ...]
    chunks: bool
    width: int | None

    @property
    def layers(self) -> int:
        """The number of layer calls."""
        return len(self.calls)

    @property
    def replays(self) -> bool:
        """Whether every step runs the whole text again."""
        return self.make_cache is None

    def layer_prefix(self, layer: int) -> str:
        """What the names of this call's own weights begin with, dot included."""
        return f"{self.calls[layer].path}."

    def rewind(self, layers: Iterable[int]) -> Literal["trim", "snapshot", "replay"]:
        """How the state of these layer calls goes back to an earlier token: by cutting it, by what was kept of the
        latest steps, or not at all, since there is none and every step runs the whole text.
        """
        if self.replays:
            return "replay"
        return "trim" if all(self.state[layer].trims for layer in layers) else "snapshot"

    @property
    def canonical(self) -> dict[str, str]:
        """Alias -> canonical name of every tied parameter."""
        return dict(self.tied)


@dataclass(frozen=True, slots=True)
class Hints:
    """What a recipe says where looking at the model is not enough. ``layer_stacks``: the path of the list of layers, of
    an encoder-decoder the encoder's and the decoder's. ``encoder``: the model is called once for each text, though its
    class could generate. ``replay``: keep no state, run the whole text in every step. ``chunks``
    false: a prompt comes whole, and behind it one token at a time.
    """

    layer_stacks: tuple[str, ...] = ()
    encoder: bool = False
    replay: bool = False
    chunks: bool = True


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name that a checkpoint may hold for this model, aliases included: parameters, then persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in persistent)


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    try:
        embeddings = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    return int(getattr(model.config.get_text_config(), "vocab_size", 0))
