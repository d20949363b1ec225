"""Publish a model: stream its tensors into block files in the node's store, and describe them in the model torrent.

One pass over the weights: each tensor is read, converted, written and hashed, and nothing larger than one tensor is in
memory. New files are staged (publish/staging.py), and appear in the store only when all of them are complete::

    source ──▶ plan (which tensor, which file) ──▶ publishing/*.safetensors ──▶ blocks/<pieces root>.safetensors
       └──▶ config, tokenizer, … + manifest + block torrents ──▶ publishing/model ──▶ models/<v2 hex>/<name>/
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from torrentlm.compute.conversion import group_tensors, published_names
from torrentlm.compute.skeleton import build_skeleton, read_config
from torrentlm.compute.split import Hints, Split, named_weights, vocabulary_of
from torrentlm.compute.splitter import analyse_sides
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.manifest import canonical
from torrentlm.manifest.canonical import TensorSpec
from torrentlm.manifest.manifest import FILE_NAME, BlockEntry, BlockFile, FileEntry, Manifest, Side
from torrentlm.manifest.torrent import Torrent, multi_file, safe_name
from torrentlm.publish.checkpoint import Checkpoint
from torrentlm.publish.checks import (
    Finiteness,
    require_known,
    require_known_words,
    require_readable_tokenizer,
    require_tokenizer,
)
from torrentlm.publish.convert import TORCH_DTYPES, converted
from torrentlm.publish.made import WithMade, made_by_model
from torrentlm.publish.payload import to_json
from torrentlm.publish.plan import Origin, Plan, plan
from torrentlm.publish.proof import prove
from torrentlm.publish.published import Progress, Published, look_up, recall, remember
from torrentlm.publish.random_weights import RandomWeights
from torrentlm.publish.source import Location, Source
from torrentlm.publish.staging import Staging, made_from, staging
from torrentlm.publish.writer import Inspect, write_block
from torrentlm.swarm.space import disk_full
from torrentlm.swarm.store import Store


def publish(
    recipe: Recipe, store: Store, progress: Progress | None = None, allow_code: Collection[str] = ()
) -> Published:
    """Publish what ``recipe`` names into ``store``, or recognise that an earlier run has done so.

    ``allow_code`` are the hashes of models' own code that may run. Blocks: call it in a worker thread. The same
    weights give the same torrents, whatever folder, machine or sharding they come from. Raises ConfigError (no such
    source), ArtifactError (a broken checkpoint), UnsupportedModelError, or StorageError (disk full, not writable);
    whatever it raises, nothing half-published is left. A run that was killed or
    interrupted is taken up where it was: complete files are not written again.
    """
    location, record = look_up(recipe, store.data)
    progress = progress or _silent
    if known := recall(record, store):
        return known if known.sidecar is not None else _prove_again(known, recipe, store, progress, allow_code)
    with staging(store, f"{record.name} {recipe.allow_nan}") as stage:
        published = _publish(recipe, location, store, stage, progress, allow_code)
        remember(record, published.model.v2)
        return published


def _silent(done: int, total: int, what: str) -> None:
    """For those who do not watch."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What config.json says the model is; ``settings`` are the published config.json's."""

    config: PretrainedConfig
    skeleton: PreTrainedModel
    shapes: Mapping[str, tuple[int, ...]]
    sides: tuple[Split, ...]
    settings: dict[str, object]


def _publish(
    recipe: Recipe,
    location: Location,
    store: Store,
    stage: Staging,
    progress: Progress,
    allow_code: Collection[str],
) -> Published:
    progress(0, 1, f"reading {location.path.name}")
    source = _open(location, recipe)
    payload = dict(source.files())
    require_known(payload["config.json"], location.path)
    words = 0
    if recipe.tokenizer and not location.is_config:
        require_tokenizer(payload.keys(), location.path)
        words = require_readable_tokenizer(payload, location.path)
    model = _understand(payload, recipe, stage.folder, allow_code)
    require_known_words(words, vocabulary_of(model.skeleton), location.path)
    payload["config.json"] = to_json(model.settings)
    origins = _find_origins(source, model)
    if made := made_by_model(model.skeleton, _missing(origins, model)):
        source = WithMade(source, made)
        origins |= {name: Origin(name, (name,)) for name in made}
    planned = plan(source.tensors, model.shapes, model.sides, recipe.layers_per_block, origins)
    specs = {name: converted(spec, recipe.dtype) for name, spec in source.tensors.items()}
    layouts = [
        canonical.layout(replace(specs[stored], name=name) for name, stored in file.tensors.items())
        for file in planned.files
    ]
    _require_space(store, [layout.size for layout in layouts], stage.size)
    finiteness = Finiteness(location.path, allowed=recipe.allow_nan)
    torrents = _write_blocks(source, planned, layouts, stage, finiteness, progress)
    dtype = _main_dtype(placed.tensor for layout in layouts for placed in layout.tensors)
    manifest = replace(_manifest(recipe.name, model, dtype, planned, layouts, torrents), floor=recipe.floor)
    distinct = tuple({torrent.name: torrent for torrent in torrents}.values())
    finiteness.tell()
    torrent, folder = _stage_model(manifest, distinct, payload, stage.folder)
    paths = {torrent.name: _path_of(torrent, store, stage.folder) for torrent in distinct}
    report = _proving(progress, manifest.size)
    sidecar = prove(
        manifest, model.config, folder, paths, sides=model.sides, replay=recipe.replay, report=report
    ).sidecar(torrent.v2)
    _move_in(torrent, distinct, folder, store, stage.folder)
    store.save_sidecar(torrent.v2, sidecar.to_bytes())
    folder = store.model_folder(torrent.v2) / torrent.name
    return Published(manifest, torrent, distinct, folder, planned.left_out, sidecar)


def _prove_again(
    known: Published, recipe: Recipe, store: Store, progress: Progress, allow_code: Collection[str]
) -> Published:
    """For what was published without a proof, or lost it."""
    config = read_config(known.folder, allow_code)
    paths = {torrent.name: store.path(torrent.name) for torrent in known.torrents}
    report = _proving(progress, known.manifest.size)
    sidecar = prove(known.manifest, config, known.folder, paths, replay=recipe.replay, report=report).sidecar(
        known.model.v2
    )
    store.save_sidecar(known.model.v2, sidecar.to_bytes())
    return replace(known, sidecar=sidecar)


def _proving(progress: Progress, size: int) -> Callable[[int, int], None]:
    """Parts proven as bytes of ``size``."""
    return lambda done, total: progress(size * done // total, size, "proof")


def _path_of(torrent: Torrent, store: Store, staging: Path) -> Path:
    staged = staging / torrent.name
    return staged if staged.exists() else store.path(torrent.name)


def _open(location: Location, recipe: Recipe) -> Source:
    if location.is_config:
        return RandomWeights(location.path, recipe.seed, recipe.dtype)
    if not location.is_gguf:
        return Checkpoint(location.path)
    from torrentlm.publish.gguf_file import GGUFFile  # takes a second to import

    return GGUFFile(location.path)


def _understand(payload: Mapping[str, bytes], recipe: Recipe, staging: Path, allow_code: Collection[str]) -> _Model:
    """Build the model that config.json describes, on paper, and complete its settings."""
    dtype = recipe.dtype
    settings = json.loads(payload["config.json"])
    if "quantization_config" in settings:
        raise UnsupportedModelError(
            "this checkpoint is quantized in a way of its own; publish the unquantized one, or a GGUF file"
        )
    for name, content in payload.items():
        if name == "config.json" or name.endswith(".py"):
            (staging / name).write_bytes(content)
    config = read_config(staging, allow_code)
    skeleton = build_skeleton(config, torch.float32)
    settings.setdefault("architectures", [type(skeleton).__name__])
    if dtype is None and not settings.keys() & {"dtype", "torch_dtype"}:
        dtype = "F32"
    if dtype is not None:
        settings.pop("torch_dtype", None)
        settings["dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    hints = Hints(recipe.layer_stacks, encoder=recipe.task == "encoder", replay=recipe.replay, chunks=recipe.chunks)
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(skeleton)}
    return _Model(config, skeleton, shapes, analyse_sides(config, hints), settings)


def _find_origins(source: Source, model: _Model) -> dict[str, Origin]:
    """What becomes of the checkpoint's tensors, by the names to publish them under. Raises ArtifactError for a
    shape."""
    origins: dict[str, Origin] = {}
    targets: dict[str, tuple[str, ...]] = {}
    for group, stored, name in published_names(model.skeleton, group_tensors(model.skeleton, source.tensors)):
        if group.target not in targets:
            blanks = {one: torch.empty(source.tensors[one].shape, device="meta") for one in group.names}
            made = group.convert(model.skeleton, blanks)
            targets[group.target] = tuple(made)
            for target, tensor in made.items():
                if tuple(tensor.shape) != model.shapes.get(target, tuple(tensor.shape)):
                    raise ArtifactError(
                        f"tensor {stored} makes {target} of shape {list(tensor.shape)}, but config.json asks for"
                        f" {list(model.shapes[target])}; fetch the checkpoint again, with its own config.json"
                    )
        origins[name] = Origin(stored, targets[group.target])
    return origins


def _missing(origins: Mapping[str, Origin], model: _Model) -> list[str]:
    """The model's weights that nothing in the checkpoint goes into, by their canonical names."""
    canonical = model.sides[0].canonical
    covered = {canonical.get(target, target) for origin in origins.values() for target in origin.targets}
    return sorted({canonical.get(name, name) for name in model.shapes} - covered)


def _require_space(store: Store, sizes: Sequence[int], staged: int) -> None:
    """Refuse at once what certainly does not fit. A file of the same size that the store holds may be one of these."""
    held = Counter(store.path(name).stat().st_size for name in store.held())
    needed = (Counter(sizes) - held).elements()
    total, free = sum(needed) - staged, shutil.disk_usage(store.data).free
    if total > free:
        raise disk_full(total, free, store.data)


def _write_blocks(
    source: Source,
    planned: Plan,
    layouts: Sequence[canonical.Layout],
    stage: Staging,
    inspect: Inspect,
    progress: Progress,
) -> list[Torrent]:
    """Stage every file that neither the store has nor an earlier run staged; their torrents, in the plan's order."""
    total = sum(layout.size for layout in layouts)
    keys = [made_from(layout, file.tensors) for file, layout in zip(planned.files, layouts, strict=True)]
    found = [stage.find(key) for key in keys]
    done = sum(torrent.size for torrent in found if torrent is not None)
    progress(done, total, "blocks")
    torrents = []
    for index, (file, layout) in enumerate(zip(planned.files, layouts, strict=True)):
        what = " and ".join(str(block) for block in planned.blocks if index in block.files)

        def report(count: int, what: str = what) -> None:
            nonlocal done
            done += count
            progress(done, total, what)

        torrent = found[index]
        if torrent is None:
            torrent = write_block(layout, file.tensors, source, stage.folder, report, inspect)
            stage.add(keys[index], torrent)
        torrents.append(torrent)
    return torrents


def _main_dtype(tensors: Iterable[TensorSpec]) -> str:
    """The dtype that most bytes are of."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype))


def _manifest(
    name: str,
    model: _Model,
    dtype: str,
    planned: Plan,
    layouts: Sequence[canonical.Layout],
    torrents: Sequence[Torrent],
) -> Manifest:
    files: dict[str, FileEntry] = {}
    numbers: dict[canonical.Layout, int] = {}
    for torrent, layout in zip(torrents, layouts, strict=True):
        number = numbers.setdefault(layout, len(numbers))
        files.setdefault(torrent.name, FileEntry(torrent.name, torrent.size, torrent.v1, torrent.v2, number))
    index_of = {file: index for index, file in enumerate(files)}  # equal layers are one file
    sides = iter(model.sides)
    blocks = []
    for block in planned.blocks:
        if block.kind == "stem":
            split = next(sides)
        used = tuple(BlockFile(index_of[torrents[file].name], planned.files[file].names) for file in block.files)
        blocks.append(BlockEntry(block.kind, block.layers, used, split.rewind(block.layers or ())))
    return Manifest(
        name,
        type(model.skeleton).__name__,
        dtype,
        tuple(Side(split.layer_stack, split.layers, split.chunks, not split.inputs.causal) for split in model.sides),
        tuple(blocks),
        tuple(files.values()),
        tuple(numbers),
    )


def _stage_model(
    manifest: Manifest, torrents: tuple[Torrent, ...], payload: Mapping[str, bytes], staging: Path
) -> tuple[Torrent, Path]:
    """The model torrent, and the folder with its content."""
    files = {**payload, FILE_NAME: manifest.to_bytes()}
    files |= {f"blocks/{torrent.name}.torrent": torrent.to_bytes() for torrent in torrents}
    model = multi_file(safe_name(manifest.name), files)
    root = staging / "model" / model.name
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return model, root


def _move_in(model: Torrent, torrents: tuple[Torrent, ...], root: Path, store: Store, staging: Path) -> None:
    """Move everything that is staged to where the store has it."""
    for torrent in torrents:
        if (staged := staging / torrent.name).exists():
            staged.replace(store.path(torrent.name))
            store.mark_verified(torrent.name)
    folder = store.model_folder(model.v2)
    shutil.rmtree(folder, ignore_errors=True)
    root.parent.replace(folder)
    store.save_torrent(model.v2, model.to_bytes())
