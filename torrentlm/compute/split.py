"""Where a model can be cut, found by watching its own code run on ghosts. No architecture is known by name.

Theory of operation. A model's *layer stack* is the ModuleList that holds most of its parameters; the model's
forward calls these layers one after the other. A *border* is what travels from one holder to the next: between
two layers the complete return value of the earlier layer's call; before the first layer those of its arguments
that the stem made from weights. One forward with autograd on, with every border cut out of the graph, leaves
for each part of the model a graph whose leaves are exactly the weights that this part reads: the *stem* for
what goes into the first call, the *head* for what follows the last one, and for each call its own weights and
(seldom) something *extra*.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer

from torrentlm.compute.border import BorderShape, Place, flatten, rebuild, replace_at, shape_of, tensors_at
from torrentlm.compute.skeleton import build_skeleton, first_line
from torrentlm.errors import UnsupportedModelError

PROBES = ((2, 3), (3, 5))
"""(Batch, tokens) of the two probing forwards: what differs between them tells the axes of a border."""


@dataclass(frozen=True)
class Split:
    """How one model is cut into the stem, its layers and the head. Parameter names are the module tree's own.

    ``layer_stack`` is the path of the ModuleList, ``layers`` its length. ``stem``, ``head`` and ``extra`` (one
    entry per layer) name what the part reads besides the weights under ``layer_prefix(layer)``; persistent
    buffers count as weights. ``tied`` pairs each alias with the canonical name of the same parameter; every
    other field uses canonical names.

    ``cache`` is the name of the forward's argument for the KV-cache and ``state`` how many numbers each layer
    keeps there per row and token. ``borders[k]`` is what travels into layer k, ``borders[layers]`` what travels
    into the head; ``entry`` are the places of the tensors of ``borders[0]`` in the pair (positional, keyword
    arguments) of the first layer's call.
    """

    layer_stack: str
    layers: int
    stem: tuple[str, ...]
    head: tuple[str, ...]
    extra: tuple[tuple[str, ...], ...]
    tied: tuple[tuple[str, str], ...]
    cache: str
    state: tuple[int, ...]
    entry: tuple[Place, ...]
    borders: tuple[BorderShape, ...]

    def layer_prefix(self, layer: int) -> str:
        """What the names of this layer's own weights begin with, dot included."""
        return f"{self.layer_stack}.{layer}."

    @property
    def canonical(self) -> dict[str, str]:
        """Alias -> canonical name of every tied parameter."""
        return dict(self.tied)


def analyse(config: PretrainedConfig) -> Split:
    """Find the split of the causal language model that ``config`` describes; needs no weights and next to no memory.

    Raises UnsupportedModelError, with the reason, for a model that cannot be cut exactly by these rules.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModelError("Encoder-decoder models cannot be split yet; choose a decoder-only model.")
    model = build_skeleton(config, torch.float32)
    path, stack = find_layer_stack(model)
    names, tied = _name_weights(model)
    one, other = (_Probe(model, stack, names, batch, tokens) for batch, tokens in PROBES)
    if one.entry != other.entry:
        raise UnsupportedModelError("What the stem passes to the first layer changes with the number of tokens.")
    _refuse_foreign_reads(model, one, names, path)

    def ordered(reads: Iterable[str]) -> tuple[str, ...]:
        wanted = set(reads)
        return tuple(name for name in dict.fromkeys(names.values()) if name in wanted)

    extra = [{name for name in reads if not name.startswith(f"{path}.{i}.")} for i, reads in enumerate(one.reads)]
    return Split(
        layer_stack=path,
        layers=len(stack),
        stem=ordered(one.stem),
        head=ordered(one.head),
        extra=tuple(ordered(reads) for reads in extra),
        tied=tied,
        cache=one.cache,
        state=one.state,
        entry=tuple(one.entry),
        borders=tuple(
            BorderShape.between(small, PROBES[0], large, PROBES[1])
            for small, large in zip(one.shapes, other.shapes, strict=True)
        ),
    )


def find_layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the ModuleList that holds the most parameters; the outermost one where several hold the same."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = size, path, module
    if best is None:
        raise UnsupportedModelError("This model has no list of layers, so there is nowhere to cut it.")
    return best[1], best[2]


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name that a checkpoint may hold for this model, aliases included: parameters, then persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in persistent)


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that the model's own forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def _name_weights(model: nn.Module) -> tuple[dict[int, str], tuple[tuple[str, str], ...]]:
    """Canonical names by the weight's id, and the pairs (alias, canonical name)."""
    names: dict[int, str] = {}
    tied: list[tuple[str, str]] = []
    for name, weight in named_weights(model):
        if id(weight) in names:
            tied.append((name, names[id(weight)]))
        else:
            names[id(weight)] = name
    return names, tuple(tied)


def _refuse_foreign_reads(model: PreTrainedModel, probe: _Probe, names: dict[int, str], path: str) -> None:
    """Refuse where a part needs another layer's weights, or the token ids, whose values only the stem is given."""
    embedding = model.get_input_embeddings()
    ids = names.get(id(getattr(embedding, "weight", None)))
    parts = [("The stem", probe.stem, None), *((f"Layer {i}", reads, i) for i, reads in enumerate(probe.reads))]
    for part, reads, layer in [*parts, ("The head", probe.head, None)]:
        for name in sorted(reads):
            if name.startswith(f"{path}.") and (layer is None or not name.startswith(f"{path}.{layer}.")):
                raise UnsupportedModelError(f"{part} reads {name}, which belongs to another layer.")
            if layer is not None and name == ids:
                raise UnsupportedModelError(
                    f"{part} reads the token embeddings ({name}) besides the earlier layer's result."
                )


class _Probe:
    """One forward on ghosts: what went over every border, and which weights were read between two of them."""

    def __init__(
        self, model: PreTrainedModel, stack: nn.ModuleList, names: dict[int, str], batch: int, tokens: int
    ) -> None:
        self._names = names
        self.entry: list[Place] = []
        self.shapes: list[BorderShape] = []
        self.stem: set[str] = set()
        self.reads: list[set[str]] = []
        result = self._run(model, stack, batch, tokens)
        self.head = self._read_by([result.logits])
        self.cache = _cache_argument(model, result)
        self.state = _state_sizes(result[self.cache], len(stack), batch * tokens)

    def _run(self, model: PreTrainedModel, stack: nn.ModuleList, batch: int, tokens: int) -> Any:
        with ExitStack() as undo:
            undo.callback(stack[0].register_forward_pre_hook(self._before_layers, with_kwargs=True).remove)
            for layer, module in enumerate(stack):
                undo.callback(module.register_forward_hook(self._after_layer(layer)).remove)
            undo.enter_context(_gradients_everywhere(model))
            try:
                result = model(input_ids=torch.zeros(batch, tokens, dtype=torch.long), use_cache=True, return_dict=True)
            except UnsupportedModelError:
                raise
            except Exception as error:  # any model's own code runs here
                raise UnsupportedModelError(
                    f"The model's forward fails without weights: {first_line(error)}"
                ) from error
        if len(self.reads) != len(stack):
            raise UnsupportedModelError(
                f"The model ran {len(self.reads)} of its {len(stack)} layers: it does not call them one by one."
            )
        if not isinstance(getattr(result, "logits", None), torch.Tensor):
            raise UnsupportedModelError("The model's forward returns no logits.")
        return result

    def _before_layers(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.shapes:
            return None
        call = (args, kwargs)
        found = {place: tensor for place, tensor in tensors_at(call) if self._read_by([tensor])}
        if not found:
            raise UnsupportedModelError("What goes into the first layer does not come from the stem's weights.")
        self.entry = list(found)
        self.stem = self._read_by(list(found.values()))
        self.shapes.append(shape_of(list(found.values()), None))
        return replace_at(call, {place: _cut(tensor) for place, tensor in found.items()})

    def _after_layer(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def cut_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if layer != len(self.reads):
                raise UnsupportedModelError(f"The model calls layer {layer} where layer {len(self.reads)} is due.")
            tensors, tree = flatten(output)
            if not tensors:
                raise UnsupportedModelError(f"Layer {layer} returns no tensor.")
            self.reads.append(self._read_by(tensors))
            self.shapes.append(shape_of(tensors, tree))
            return rebuild([_cut(tensor) for tensor in tensors], tree)

        return cut_output

    def _read_by(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        """Canonical names of the weights at the leaves of these tensors' graphs."""
        tensors = list(tensors)
        found = {self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names}
        seen: set[Any] = set()
        waiting = [tensor.grad_fn for tensor in tensors]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = self._names.get(id(getattr(node, "variable", None)))
            if name is not None:
                found.add(name)
            waiting.extend(parent for parent, _ in node.next_functions)
        return found


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _cache_argument(model: PreTrainedModel, result: Any) -> str:
    caches = [name for name, value in result.items() if isinstance(value, Cache)]
    if len(caches) != 1 or type(result[caches[0]]) is not DynamicCache:
        raise UnsupportedModelError("The model keeps its state in something else than transformers' dynamic KV-cache.")
    if caches[0] not in forward_arguments(model):
        raise UnsupportedModelError(f"The model's forward returns {caches[0]} but does not take it back.")
    return str(caches[0])


def _state_sizes(cache: DynamicCache, layers: int, tokens: int) -> tuple[int, ...]:
    """Numbers kept per row and token, layer by layer."""
    if len(cache.layers) != layers:
        raise UnsupportedModelError(f"The KV-cache has {len(cache.layers)} entries for {layers} layers.")
    sizes = []
    for layer, entry in enumerate(cache.layers):
        if not isinstance(entry, DynamicLayer | DummyLayer):
            raise UnsupportedModelError(f"Layer {layer} keeps a state that is no KV-cache ({type(entry).__name__}).")
        kept = [tensor.numel() for tensor in (entry.keys, entry.values) if tensor is not None]
        sizes.append(-(-sum(kept) // tokens))
    return tuple(sizes)


@contextmanager
def _gradients_everywhere(model: nn.Module) -> Iterator[None]:
    """Autograd also where the model switches it off: some models read position tables under ``no_grad``."""

    def enter(self: torch.no_grad) -> None:
        self.prev = torch.is_grad_enabled()

    weights = [weight for _, weight in named_weights(model) if weight.is_floating_point()]
    flags = [weight.requires_grad for weight in weights]
    original = torch.no_grad.__enter__
    torch.no_grad.__enter__ = enter  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            yield
    finally:
        torch.no_grad.__enter__ = original  # type: ignore[method-assign]
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
