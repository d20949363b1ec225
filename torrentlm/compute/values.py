"""Nested values as models pass and return them: taken apart into tensors and a form, and put together again.

A form never travels: every holder finds the same one by running the same model's code on ghosts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from torrentlm.errors import UnsupportedModelError

MAX_DEPTH = 8

Place = tuple[int | str, ...]
"""Where a tensor hangs in nested tuples, lists and maps: the indices and keys from the top down."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Stands for tensor number ``index``."""

    index: int


@dataclass(frozen=True, slots=True)
class CacheLeaf:
    """Stands for the session's own cache, which some layers hand back."""


@dataclass(frozen=True, slots=True)
class Form:
    """A container: ``kind`` makes one of ``parts`` (a list of pairs for maps)."""

    kind: type
    keys: tuple[Any, ...] | None
    parts: tuple[Any, ...]


def flatten(value: Any) -> tuple[list[torch.Tensor], Any]:
    """The tensors of a nested value in order, and its form. Raises UnsupportedModelError for what has no form."""
    tensors: list[torch.Tensor] = []

    def walk(part: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnsupportedModelError("The layers return values nested too deeply to be sent on.")
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            return Leaf(len(tensors) - 1)
        if isinstance(part, Cache):
            return CacheLeaf()
        if isinstance(part, ModelOutput) or type(part) is dict:
            return Form(type(part), tuple(part), tuple(walk(item, depth + 1) for item in part.values()))
        if isinstance(part, tuple | list):
            return Form(type(part), None, tuple(walk(item, depth + 1) for item in part))
        if part is None or isinstance(part, bool | int | float | str | torch.Size | torch.dtype):
            return part
        raise UnsupportedModelError(
            f"The layers return a {type(part).__name__}, which cannot be sent to another holder."
        )

    return tensors, walk(value, 0)


def rebuild(tensors: Sequence[Any], form: Any, cache: Any) -> Any:
    """What ``flatten`` took apart, with these tensors and the running session's cache."""
    match form:
        case Leaf(index):
            return tensors[index]
        case CacheLeaf():
            return cache
        case Form(kind, None, parts):
            items = [rebuild(tensors, part, cache) for part in parts]
            return kind(*items) if hasattr(kind, "_fields") else kind(items)
        case Form(kind, tuple(keys), parts):
            pairs = dict(zip(keys, (rebuild(tensors, part, cache) for part in parts), strict=True))
            return pairs if kind is dict else kind(**pairs)
    return form


def tensors_at(value: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every tensor in nested tuples, lists and maps with its place; anything else is passed over."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif len(place) < MAX_DEPTH and type(value) in (tuple, list):
        for index, item in enumerate(value):
            yield from tensors_at(item, (*place, index))
    elif len(place) < MAX_DEPTH and isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str | int):
                yield from tensors_at(item, (*place, key))


def at(value: Any, place: Place) -> Any:
    """What hangs there."""
    for key in place:
        value = value[key]
    return value


def replace_at(value: Any, replacements: Mapping[Place, Any]) -> Any:
    """A copy of nested tuples, lists and dicts with other tensors at some places."""
    if () in replacements:
        return replacements[()]
    if not replacements:
        return value
    below: dict[int | str, dict[Place, Any]] = {}
    for place, tensor in replacements.items():
        below.setdefault(place[0], {})[place[1:]] = tensor
    if isinstance(value, dict):
        return {key: replace_at(item, below.get(key, {})) for key, item in value.items()}
    return type(value)(replace_at(item, below.get(index, {})) for index, item in enumerate(value))


def mutable_maps(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, MutableMapping[Any, Any]]]:
    """The maps among a call's arguments that the layer could write to, with their places in (args, kwargs)."""
    for side, items in ((0, enumerate(args)), (1, kwargs.items())):
        for key, item in items:
            if isinstance(item, MutableMapping) and not isinstance(item, ModelOutput):
                yield (side, key), item
