"""From a checkpoint's tensors to a model's: the renaming, merging and splitting that transformers does when it loads
one.

Most checkpoints name their tensors as the model does, or differ by a prefix. Some are of another form: an expert's
matrix each, where the model has one for all experts. Blocks keep the checkpoint's form, and holders convert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from torrentlm.errors import ArtifactError


@dataclass(slots=True)
class Group:
    """Tensors of a checkpoint, by the names there, that become tensors of the model. ``target`` names the first of
    these; ``converter`` is None where a single one only gets another name.
    """

    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sources)

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors, made of ``tensors``, which has all of the group. Raises ArtifactError."""
        if self.converter is None:
            return {self.target: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, tensors[name])
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except Exception as error:  # transformers' code runs on whatever the checkpoint holds
            raise ArtifactError(
                f"tensor {self.sources[0][0]} and those that belong to it cannot be made into {self.target}; fetch the"
                " whole checkpoint again"
            ) from error
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def published_names(model: PreTrainedModel, groups: Iterable[Group]) -> Iterator[tuple[Group, str, str]]:
    """(group, name in the checkpoint, name to publish it under) of every tensor: the model's own name where nothing but
    the name changes, else the checkpoint's below the model's prefixes.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    for group in groups:
        for name in group.names:
            if group.converter is None:
                yield group, name, group.target
                continue
            renamed = apply_renamings(name, renamings)
            inside = group.target.startswith(prefix) and not renamed.startswith(prefix)
            yield group, name, prefix + renamed if inside else renamed


def group_tensors(model: PreTrainedModel, stored: Iterable[str]) -> list[Group]:
    """What becomes of tensors with these names; a name that the model has no use for is in no group."""
    weight_mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    groups: dict[str, Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target in known:
            group = groups.setdefault(target, Group(target))
            group.sources.append((name, pattern or name))
            if pattern is not None:
                group.converter = by_pattern[pattern]
    return list(groups.values())


def convert_all(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], known: frozenset[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors made of a block's, of which those called as in ``known`` are the model's already."""
    foreign = [name for name in tensors if name not in known]
    yield from ((name, tensor) for name, tensor in tensors.items() if name in known)
    for group in group_tensors(model, foreign) if foreign else ():
        yield from group.convert(model, tensors).items()
