"""Which modules of a model are its layers: nothing but the shape of the module tree is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from torrentlm.errors import UnsupportedModelError

MAX_STACKS = 8


@dataclass(frozen=True, slots=True)
class Stack:
    """A ModuleList of layers, by its path, or several ("a+b"). Where its entries are lists themselves, theirs are the
    layers.
    """

    path: str
    layers: tuple[tuple[str, nn.Module], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.path.split("+"))


def find_stacks(model: nn.Module, root: str = "") -> list[Stack]:
    """Every outermost ModuleList below ``root``, the one with the most parameters first; at last all of them as one.

    Raises UnsupportedModelError where there is none.
    """
    found: list[tuple[int, Stack]] = []
    for path, module in _outermost(model.get_submodule(root), root):
        layers = tuple(_leaves(module, path))
        if layers:
            found.append((sum(parameter.numel() for parameter in module.parameters()), Stack(path, layers)))
    if not found:
        raise UnsupportedModelError("This model has no list of layers, so there is nowhere to cut it.")
    found.sort(key=lambda entry: -entry[0])  # stable: of equals the first in the tree
    stacks = [stack for _, stack in found[:MAX_STACKS]]
    if len(stacks) > 1:
        every = tuple(layer for stack in stacks for layer in stack.layers)
        stacks.append(Stack("+".join(stack.path for stack in stacks), every))
    return stacks


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield below, child
        else:
            yield from _outermost(child, below)


def _leaves(stack: nn.ModuleList, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in stack.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _leaves(child, f"{path}.{name}")
        else:
            yield f"{path}.{name}", child
