"""Which tensor goes into which file of which block: a pure function of names and the model's split.

A tensor that one block needs goes into that block's file, one that several need into a file that all of them list. A
layer's tensors have a file to themselves, so that it depends on nothing but that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torrentlm.compute.split import Split
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.manifest.manifest import BlockFile, Kind
from torrentlm.records import Span


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """``tensors``: name in the file -> name in the checkpoint. ``names`` are the manifest's pairs of prefixes."""

    tensors: Mapping[str, str]
    names: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """``files`` are indices into the plan's files."""

    kind: Kind
    layers: Span | None
    files: tuple[int, ...]

    def __str__(self) -> str:
        return self.kind if self.layers is None else f"{self.kind} {self.layers}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks in the order in which they run. ``left_out``: tensors of the checkpoint that no block reads."""

    blocks: tuple[PlannedBlock, ...]
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]


def plan(stored: Collection[str], weights: Collection[str], split: Split, layers_per_block: int) -> Plan:
    """Distribute a checkpoint's tensors, named ``stored``, over blocks of at most ``layers_per_block`` layers.

    ``weights`` are all names that the model itself has, aliases included. Raises ArtifactError when a weight is
    missing, UnsupportedModelError when the checkpoint uses other names than the model.
    """
    checkpoint_names = _match(stored, weights, split)
    spans = [
        Span(first, min(first + layers_per_block, split.layers) - 1)
        for first in range(0, split.layers, layers_per_block)
    ]
    readers = _readers(checkpoint_names, split, spans)
    groups: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for name, blocks in readers.items():
        if blocks:
            groups.setdefault((blocks, _is_layers(name, split)), []).append(name)
    files: list[PlannedFile] = []
    used: list[list[int]] = [[] for _ in range(len(spans) + 2)]
    for (blocks, in_layer), names in sorted(groups.items()):
        relative, pairs = _layer_names(names, split, spans[blocks[0] - 1]) if in_layer else _other_names(names, split)
        files.append(PlannedFile({relative[name]: checkpoint_names[name] for name in names}, pairs))
        for block in blocks:
            used[block].append(len(files) - 1)
    kinds: list[tuple[Kind, Span | None]] = [("stem", None), *(("layers", span) for span in spans), ("head", None)]
    published = {checkpoint_names[name] for name, blocks in readers.items() if blocks}
    return Plan(
        tuple(PlannedBlock(kind, span, tuple(own)) for (kind, span), own in zip(kinds, used, strict=True)),
        tuple(files),
        tuple(sorted(set(stored) - published)),
    )


def _match(stored: Collection[str], weights: Collection[str], split: Split) -> dict[str, str]:
    """Canonical name -> the checkpoint's name, for every weight of the model."""
    found = {name: name for name in weights if name in stored and name not in split.canonical}
    for alias, canonical in split.tied:
        if alias in stored:
            found.setdefault(canonical, alias)
    missing = [name for name in weights if split.canonical.get(name, name) not in found]
    unknown = sorted(set(stored) - set(weights))
    if missing and unknown:
        raise UnsupportedModelError(
            f"the checkpoint names its tensors in another way than the model ({unknown[0]}, where the model has"
            f" {missing[0]}); load it with transformers, save it again and publish that"
        )
    if missing:
        raise ArtifactError(f"the checkpoint lacks tensor {missing[0]}; fetch the whole checkpoint")
    return found


def _readers(names: Collection[str], split: Split, spans: list[Span]) -> dict[str, tuple[int, ...]]:
    """The blocks that read each weight, in the model's order of names."""
    block_of = {layer: block for block, span in enumerate(spans, 1) for layer in span}
    readers: dict[str, set[int]] = {name: set() for name in names}
    own = {f"{split.layer_stack}.{layer}.": block for layer, block in block_of.items()}
    for name in names:
        if _is_layers(name, split):
            prefix = ".".join(name.split(".")[: split.layer_stack.count(".") + 2]) + "."
            readers[name].add(own[prefix])
    for block, read in ((0, split.stem), (len(spans) + 1, split.head)):
        for name in read:
            readers[name].add(block)
    for layer, read in enumerate(split.extra):
        for name in read:
            readers[name].add(block_of[layer])
    return {name: tuple(sorted(blocks)) for name, blocks in readers.items()}


def _is_layers(name: str, split: Split) -> bool:
    return name.startswith(f"{split.layer_stack}.")


def _layer_names(names: list[str], split: Split, span: Span) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Names relative to the layer; where a block has several layers, after the layer's place in the block."""
    pairs = tuple(
        (f"{place}." if len(span) > 1 else "", f"{split.layer_stack}.{layer}.") for place, layer in enumerate(span)
    )
    relative = {
        name: in_file + name.removeprefix(prefix)
        for name in names
        for in_file, prefix in pairs
        if name.startswith(prefix)
    }
    return relative, pairs


def _other_names(names: list[str], split: Split) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Names without the prefix that the layer stack has too ("model."), if the way back is unambiguous."""
    parent = split.layer_stack.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    relative = {name: name.removeprefix(prefix) for name in names}
    pairs = [("", prefix)] if any(name.startswith(prefix) for name in names) else [("", "")]
    if pairs[0][1]:
        pairs += [(name, name) for name in sorted(names) if not name.startswith(prefix)]
    found = BlockFile(0, tuple(pairs))
    if len(set(relative.values())) == len(names) and all(found.full_name(relative[name]) == name for name in names):
        return relative, found.names
    return {name: name for name in names}, (("", ""),)
