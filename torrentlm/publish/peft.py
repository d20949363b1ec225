"""A PEFT folder as a source: which linear layers a LoRA adapter changes, and by how much. Pickle is never read.

What is understood is what can be computed exactly: A, B and a scaling for each linear layer. Anything else that an
adapter may be (PEFT has two dozen settings) is refused by name, since leaving it out would be silently wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torrentlm.errors import ArtifactError, ConfigError, UnsupportedModelError
from torrentlm.manifest.adapter import DOWN, UP
from torrentlm.manifest.canonical import Placed, TensorSpec, read_layout
from torrentlm.publish.source import read_exactly, unreadable

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
MAX_SETTINGS = 16 << 20  # bytes

_USED = frozenset(("alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"))
_OF_TRAINING = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # how the base keeps its weight: A and B are the same either way
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",  # the tensors say which
        "task_type",
    )
)
"""Settings that do not change what the saved tensors compute."""
_EXACT_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base's weights alone."""


@dataclass(frozen=True, slots=True)
class Change:
    """How one linear layer is changed: where its A and B lie in the file, and by what B A is multiplied."""

    down: Placed
    up: Placed
    scaling: float


class PeftFolder:
    """The adapter in ``folder``; only headers are read until a tensor is asked for.

    Raises ConfigError where there is no such folder, ArtifactError for a broken adapter, UnsupportedModelError for one
    that is more than a LoRA of linear layers.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; set folder to a PEFT adapter's folder")
        self.folder = folder
        self._path = folder / WEIGHTS
        settings = _read_settings(folder / SETTINGS)
        _refuse_settings(settings, folder)
        if not self._path.is_file():
            raise ArtifactError(_no_weights(folder))
        self.changes = dict(self._find(settings))
        """By the linear layer's name in the base model, sorted."""

    def read(self, placed: Placed) -> Iterator[memoryview]:
        """A tensor's bytes, in chunks. Raises ArtifactError."""
        return read_exactly(self._path, placed.start, placed.tensor.nbytes)

    def _find(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, Change]]:
        tensors = _tensors(self._path)
        halves: dict[str, dict[str, Placed]] = {}
        for name, placed in tensors.items():
            module, end = self._split(name)
            if halves.setdefault(module, {}).setdefault(end, placed) is not placed:
                raise ArtifactError(f"{self._path} has two tensors for {module}{end}; fetch the adapter again")
        if not halves:
            raise ArtifactError(f"{self._path} holds no tensors; fetch the adapter again")
        for module, pair in sorted(halves.items()):
            if len(pair) != 2:
                raise ArtifactError(f"{self._path} has only one of A and B of {module}; fetch the adapter again")
            rank, scaling = _scaling(module, settings, self.folder)
            down, up = pair[DOWN], pair[UP]
            if not _fit(down.tensor, up.tensor, rank):
                raise ArtifactError(
                    f"A and B of {module} have shapes {list(down.tensor.shape)} and {list(up.tensor.shape)} where "
                    f"{SETTINGS} asks for rank {rank}; fetch the adapter again, with its own {SETTINGS}"
                )
            yield module, Change(down, up, scaling)

    def _split(self, name: str) -> tuple[str, str]:
        """The linear layer and which of its two tensors this is."""
        short = name.removeprefix(PREFIX)
        for end in (DOWN, UP):
            if short.endswith(end):
                return short.removesuffix(end), end
        if "lora_embedding_" in short:
            what = "changes embeddings, which is not supported: train it on linear layers alone"
        elif "lora_magnitude_vector" in short:
            what = "is a DoRA adapter, which is not supported: train a plain LoRA"
        elif ".lora_B.bias" in short:
            what = "has biases of its own, which is not supported: train it with lora_bias=False"
        elif ".base_layer." in short:
            what = "holds a copy of the base's weights, which may be others: save it with save_embedding_layers=False"
        else:
            what = "holds whole weights besides A and B, which is not supported: train it without modules_to_save"
        raise UnsupportedModelError(f"the adapter in {self.folder} {what} ({short[:100]})")


def _fit(down: TensorSpec, up: TensorSpec, rank: int) -> bool:
    return len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] == rank == up.shape[1]


def _scaling(module: str, settings: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    """Rank and scaling of one linear layer, as PEFT has them."""
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    for patterns, what in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
        for pattern, value in (settings.get(patterns) or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise ArtifactError(
                    f"{patterns} in {folder / SETTINGS} has a pattern that cannot be read ({error}); mend it"
                ) from error
            if matches:
                rank, alpha = (value, alpha) if what == "r" else (rank, value)
                break
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ArtifactError(f"r and lora_alpha in {folder / SETTINGS} must be numbers; fetch the adapter again")
    return rank, float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _refuse_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """UnsupportedModelError for an adapter that is more than A, B and a scaling."""
    where = f"the adapter in {folder}"
    if settings.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{where} is no LoRA but {settings.get('peft_type')!r:.40}; only LoRA is supported")
    if settings.get("use_dora"):
        raise UnsupportedModelError(f"{where} is a DoRA adapter, which is not supported: train a plain LoRA")
    if settings.get("modules_to_save"):
        raise UnsupportedModelError(
            f"{where} replaces whole modules (modules_to_save), which is not supported: train it on linear layers alone"
        )
    if settings.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f'{where} trains the base\'s biases, which is not supported: train it with bias="none"'
        )
    start = settings.get("init_lora_weights", True)
    if start not in _EXACT_STARTS:
        raise UnsupportedModelError(
            f"{where} was begun with init_lora_weights={start!r:.40}, which changes the base's own weights; save it "
            "with path_initial_model_for_weight_conversion, as PEFT explains"
        )
    known = _USED | _OF_TRAINING | {"bias", "init_lora_weights", "modules_to_save", "use_dora"}
    for name, value in sorted(settings.items()):
        if name not in known and value:
            raise UnsupportedModelError(
                f"{where} sets {name[:60]} in {SETTINGS}, which is not supported: train it without"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SETTINGS + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read; point to the folder that PEFT saved the adapter in") from error
    try:
        settings = json.loads(content) if len(content) <= MAX_SETTINGS else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path} is not a JSON object; fetch the adapter again")
    return settings


def _no_weights(folder: Path) -> str:
    for name in PICKLED:
        if (folder / name).is_file():
            return (
                f"{folder / name} is a pickle, which can run code when it is read; save the adapter again with "
                "safe_serialization=True and publish that"
            )
    return f"{folder} has no {WEIGHTS}; fetch the whole adapter"


def _tensors(path: Path) -> dict[str, Placed]:
    try:
        with path.open("rb") as file:
            layout = read_layout(file, path.stat().st_size, str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    return {placed.tensor.name: placed for placed in layout.tensors}
