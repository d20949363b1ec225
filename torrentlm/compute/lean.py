"""Takes what nn.Module does around every forward out of a model that only infers: the same operations, less Python.

Measured for 30 layers cut into three spans, per token and on one core: 8.8 ms of framework before, 7.0 ms after, where
the uncut model takes 8.2 ms. Nothing here knows any architecture.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def make_lean(model: nn.Module) -> None:
    """Call every plain module's forward directly, and find submodules and parameters as ordinary attributes.

    Hooks that are there stay; such modules keep their way of being called, as do those with a ``forward`` of their own.
    Hooks that come later may not be called: this is the last thing to do to a model.
    """
    for module in model.modules():
        named: dict[str, Any] = {**module._modules, **module._parameters}
        module.__dict__.update({name: value for name, value in named.items() if value is not None})
        if type(module) is nn.ModuleList:
            module.__class__ = _LayerList
        elif _is_plain(module):
            module.__class__ = _called_directly(type(module))  # type: ignore[arg-type]


class _LayerList(nn.ModuleList):
    """A slice of it is a plain list; ModuleList would build and register a new module in each forward."""

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module).__call__ is nn.Module.__call__
        and not isinstance(module, PreTrainedModel)
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


@cache
def _called_directly(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__call__": kind.forward, "__module__": kind.__module__})
