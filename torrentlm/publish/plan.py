"""Which tensor goes into which file of which block: a pure function of names and the model's split.

A tensor that one block needs goes into that block's file, one that several need into a file that all of them list. A
layer's tensors have a file to themselves, so that it depends on nothing but that layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a published tensor comes from: its name in the checkpoint, and the model's weights that it goes into."""

    stored: str
    targets: tuple[str, ...]


def plan(
    stored: Collection[str],
    weights: Collection[str],
    sides: Sequence[Split],
    layers_per_block: int,
    origins: Mapping[str, Origin] | None = None,
) -> Plan:
    """Distribute a checkpoint's tensors, named ``stored``, over blocks of at most ``layers_per_block`` layers.

    ``weights`` are all names that the model itself has, aliases included. ``origins`` tells of every tensor to publish,
    by the name to publish it under; without it the checkpoint names its tensors as the model does. Raises ArtifactError
    when a weight is missing, UnsupportedModelError when the checkpoint uses other names than the model.
    """
    if origins is None:
        origins = {name: Origin(name, (name,)) for name in weights if name in stored}
    origins = _match(origins, stored, weights, sides[0])
    canonical = sides[0].canonical
    weight_readers: dict[str, set[int]] = {canonical.get(name, name): set() for name in weights}
    kinds: list[tuple[Kind, Span | None]] = []
    for split in sides:
        spans = [
            Span(first, min(first + layers_per_block, split.layers) - 1)
            for first in range(0, split.layers, layers_per_block)
        ]
        _add_readers(weight_readers, split, spans, len(kinds))
        kinds += [("stem", None), *(("layers", span) for span in spans), ("head", None)]
    readers = {
        name: set().union(*(weight_readers[canonical.get(target, target)] for target in origin.targets))
        for name, origin in origins.items()
    }
    layer_of = _layer_prefixes(readers, sides)
    groups: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for name, blocks in readers.items():
        if blocks:
            groups.setdefault((tuple(sorted(blocks)), name in layer_of), []).append(name)
    files: list[PlannedFile] = []
    used: list[list[int]] = [[] for _ in kinds]
    for (sharing, in_layer), names in sorted(groups.items()):
        relative, pairs = _layer_names(names, layer_of) if in_layer else _other_names(names, sides[0])
        files.append(PlannedFile({relative[name]: origins[name].stored for name in names}, pairs))
        for block in sharing:
            used[block].append(len(files) - 1)
    published = {origins[name].stored for name, blocks in readers.items() if blocks}
    return Plan(
        tuple(PlannedBlock(kind, span, tuple(own)) for (kind, span), own in zip(kinds, used, strict=True)),
        tuple(files),
        tuple(sorted(set(stored) - published)),
    )


def _match(
    origins: Mapping[str, Origin], stored: Collection[str], weights: Collection[str], split: Split
) -> dict[str, Origin]:
    """The origins under canonical names, in the model's order as far as it has these; every weight of the model has
    one."""
    aliases = split.canonical
    found = {name: origins[name] for name in weights if name in origins and name not in aliases}
    for alias, canonical in split.tied:
        if alias in origins:
            found.setdefault(canonical, origins[alias])
    found |= {name: origin for name, origin in origins.items() if name not in found and name not in aliases}
    covered = {aliases.get(target, target) for origin in found.values() for target in origin.targets}
    missing = [name for name in weights if aliases.get(name, name) not in covered]
    unknown = sorted(set(stored) - {origin.stored for origin in origins.values()})
    if missing and unknown:
        raise UnsupportedModelError(
            f"the checkpoint names its tensors in another way than the model ({unknown[0]}, where the model has"
            f" {missing[0]}); load it with transformers, save it again and publish that"
        )
    if missing:
        raise ArtifactError(f"the checkpoint lacks tensor {missing[0]}; fetch the whole checkpoint")
    return found


def _add_readers(readers: dict[str, set[int]], split: Split, spans: Sequence[Span], stem: int) -> None:
    """Add one side's blocks, of which block ``stem`` is the first, to those that read each weight."""
    block_of = {layer: block for block, span in enumerate(spans, stem + 1) for layer in span}
    for layer, block in block_of.items():
        prefix = split.layer_prefix(layer)
        for name in readers:
            if name.startswith(prefix):
                readers[name].add(block)
        for alias, name in split.tied:
            if alias.startswith(prefix):
                readers[name].add(block)
    for block, read in ((stem, split.stem), (stem + len(spans) + 1, split.head)):
        for name in read:
            readers[name].add(block)
    for layer, read in enumerate(split.extra):
        for name in read:
            readers[name].add(block_of[layer])


def _layer_prefixes(names: Iterable[str], sides: Sequence[Split]) -> dict[str, str]:
    """The prefix of the layer that each weight belongs to, for those that belong to one."""
    prefixes = list(dict.fromkeys(split.layer_prefix(layer) for split in sides for layer in range(split.layers)))
    return {name: prefix for name in names for prefix in prefixes if name.startswith(prefix)}


def _layer_names(names: list[str], layer_of: Mapping[str, str]) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Names relative to the layer; where a file has several layers, after the layer's place among them."""
    prefixes = list(dict.fromkeys(layer_of[name] for name in names))
    in_file = {prefix: f"{place}." if len(prefixes) > 1 else "" for place, prefix in enumerate(prefixes)}
    relative = {name: in_file[layer_of[name]] + name.removeprefix(layer_of[name]) for name in names}
    return relative, tuple((in_file[prefix], prefix) for prefix in prefixes)


def _other_names(names: list[str], split: Split) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Names without the prefix that the layer stack has too ("model."), if the way back is unambiguous."""
    parent = split.layer_stack.partition("+")[0].rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    relative = {name: name.removeprefix(prefix) for name in names}
    pairs = [("", prefix)] if any(name.startswith(prefix) for name in names) else [("", "")]
    if pairs[0][1]:
        pairs += [(name, name) for name in sorted(names) if not name.startswith(prefix)]
    found = BlockFile(0, tuple(pairs))
    if len(set(relative.values())) == len(names) and all(found.full_name(relative[name]) == name for name in names):
        return relative, found.names
    return {name: name for name in names}, (("", ""),)
