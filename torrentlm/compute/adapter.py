"""Adds an adapter's changes to a span's linear layers, for one forward at a time: y + scaling · B (A x).

The base's weights stay as they are, mapped and shared. While a forward with an adapter runs, the linear layers that the
adapter changes are of another class, which adds the change to what their own class computes; then they are what they
were. So a forward without an adapter runs exactly the code that it ran before, and a runner's lock keeps sessions
with different adapters apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from torrentlm.compute.weights import BlockFiles, Weights
from torrentlm.errors import ArtifactError
from torrentlm.manifest.adapter import DOWN, UP

_CHANGE, _COMPUTING = "_torrentlm_change", "_torrentlm_computing"


@dataclass(frozen=True, slots=True)
class Change:
    """``down`` A [rank, in], ``up`` B [out, rank], both in the dtype and on the device that is computed in."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """What to add to the layer's output for its input ``value`` [..., in]: [..., out]."""
        low = nn.functional.linear(value.to(self.down.dtype), self.down)
        return nn.functional.linear(low, self.up) * self.scaling

    def added_to(self, weight: torch.Tensor, turned: bool) -> torch.Tensor:
        """A copy of the layer's ``weight`` with the change; [out, in], or [in, out] if ``turned``."""
        change = (self.up @ self.down) * self.scaling
        return weight + (change.T if turned else change).to(weight.dtype)


class Adapter:
    """An adapter's changes for some blocks, by the linear layer's name in the model.

    ``files`` are its block files, ``scalings`` those of all their layers. Adapters that load from the same file share
    its one copy in memory. Raises ArtifactError for a broken file or one that does not fit the scalings, StorageError
    for an unreadable one.
    """

    def __init__(
        self, files: BlockFiles, scalings: Mapping[str, float], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weights = Weights(files, dtype, device)  # keeps what several adapters share in use
        tensors = self._weights.tensors
        if tensors.keys() != {name + end for name in scalings for end in (DOWN, UP)}:
            raise ArtifactError("the adapter's files and its manifest disagree; publish the adapter again")
        self._modules: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, Change]]] = WeakKeyDictionary()
        self.changes = {
            name: Change(tensors[name + DOWN], tensors[name + UP], scaling) for name, scaling in scalings.items()
        }

    def modules(self, model: nn.Module) -> list[tuple[nn.Module, Change]]:
        """The linear layers of ``model`` that are changed; looked up once, since every step needs them."""
        if (found := self._modules.get(model)) is None:
            found = [(model.get_submodule(name), change) for name, change in self.changes.items()]
            self._modules[model] = found
        return found

    def check(self, model: nn.Module) -> None:
        """Raise ArtifactError unless every change fits a linear layer of ``model``."""
        for name, change in self.changes.items():
            module = _module(model, name)
            sizes = None if module is None else _sizes(module)
            if sizes is None:
                raise ArtifactError(f"the adapter changes {name[:100]}, which is no linear layer of this model")
            if sizes != (change.down.shape[1], change.up.shape[0]):
                raise ArtifactError(
                    f"the adapter's change of {name[:100]} is from {change.down.shape[1]} to {change.up.shape[0]} "
                    f"numbers, but the layer is from {sizes[0]} to {sizes[1]}: it was made for another model"
                )


@contextmanager
def applied(adapter: Adapter | None, model: nn.Module) -> Iterator[None]:
    """Within it, forwards of ``model`` have the adapter's changes, if there is one; ``check`` has to come first.

    Not for two at a time on one model. (nn.Module's own way of setting an attribute is slow, so it is passed by.)
    """
    undo: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, change in adapter.modules(model) if adapter is not None else ():
            undo.append((module, type(module)))
            module.__dict__[_CHANGE] = change
            object.__setattr__(module, "__class__", _changing(type(module)))  # type: ignore[arg-type]
        yield
    finally:
        for module, kind in undo:
            object.__setattr__(module, "__class__", kind)
            module.__dict__.pop(_CHANGE, None)


@cache
def _changing(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with the change added, however it is called: compute/lean.py may have changed that.

    Some models read a layer's weight instead of calling the layer: they get one with the change in it.
    """
    own_call: Any = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_COMPUTING] = True
        try:
            result = own_call(self, *args, **kwargs)
        finally:
            del self.__dict__[_COMPUTING]
        value = args[0] if args else next(iter(kwargs.values()))
        return result + self.__dict__[_CHANGE].of(value).to(result.dtype)

    def weight(self: Any) -> torch.Tensor:
        own: torch.Tensor = self._parameters["weight"]
        return own if _COMPUTING in self.__dict__ else self.__dict__[_CHANGE].added_to(own, _is_turned(self))

    return type(kind.__name__, (kind,), {"__call__": call, "weight": property(weight), "__module__": kind.__module__})


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if _is_turned(module):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None


def _is_turned(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer that keeps its weight as [in, out]."""
    return isinstance(module, Conv1D)
