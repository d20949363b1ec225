"""The file, the environment and the options, merged into one ``Settings``: one function of its arguments.

``load`` reads the file and the environment for ``merge``. Each key is a field of ``Recipe`` or ``NodeConfig`` and has a
``Kind`` that reads its value.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torrentlm.config.kinds import (
    BLOCKS,
    BOOTSTRAP,
    BOUND,
    BUDGET,
    COUNT,
    DEVICES,
    DTYPE,
    ENDPOINTS,
    FLAG,
    FLOOR,
    HASHES,
    LIMIT,
    PATH,
    PORT,
    PRECISION,
    PRECISION_OF,
    RATE,
    SECONDS,
    SEED,
    SHARE,
    TASK,
    TEXT,
    TEXTS,
    THREADS,
    Kind,
)
from torrentlm.config.settings import AdapterRecipe, NodeConfig, Recipe, Settings, default_data
from torrentlm.errors import ConfigError

_TYPE_NAMES = {int: "the number", float: "the number", str: "the text", list: "the list"}

MAX_FILE = 1 << 20
"""A model.toml is a page of text; more than this many bytes is some other file."""

MODEL_KEYS = {
    "name": TEXT,
    "layers_per_block": COUNT,
    "dtype": DTYPE,
    "tokenizer": FLAG,
    "allow_nan": FLAG,
    "floor": FLOOR,
}
SOURCE_KEYS = {
    "folder": PATH,
    "gguf": PATH,
    "package": TEXT,
    "file": TEXT,
    "config": PATH,
    "seed": SEED,
    "consume": FLAG,
}
SPLIT_KEYS = {"layer_stacks": TEXTS, "task": TASK, "replay": FLAG, "chunks": FLAG}
ADAPTER_KEYS = {"name": TEXT, "folder": PATH}
NODE_KEYS = {
    "data": PATH,
    "host": TEXT,
    "port": PORT,
    "peers": ENDPOINTS,
    "dht_bootstrap": BOOTSTRAP,
    "blocks": BLOCKS,
    "devices": DEVICES,
    "ram": BUDGET,
    "vram": BUDGET,
    "offload": BOUND,
    "disk": BUDGET,
    "precision": PRECISION,
    "precision_of": PRECISION_OF,
    "threads": THREADS,
    "lease": SECONDS,
    "allow_code": HASHES,
    "adapters": BOUND,
    "recheck": FLAG,
    "prefetch": SHARE,
    "prefetch_rate": RATE,
    "upload": LIMIT,
    "download": LIMIT,
    "mirror": FLAG,
}
TABLES: dict[str, tuple[str, ...]] = {
    "": ("magnet", "model", "adapter", "node"),
    "model": (*MODEL_KEYS, "source", "split"),
    "model.source": tuple(SOURCE_KEYS),
    "model.split": tuple(SPLIT_KEYS),
    "adapter": tuple(ADAPTER_KEYS),
    "node": tuple(NODE_KEYS),
}
"""Every table of a model.toml with its keys; "" is the top."""

OTHER_VARIABLES = ("DEBUG", "LOOPBACK_ONLY", "ALLOWED_NETS", "PARENT")
"""``TORRENTLM_*`` variables that are no settings of a node; those that begin with ``TEST_`` are left to the tests."""


def load(
    target: str | Path,
    *,
    overrides: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Settings for ``target``, a magnet link or the path of a model.toml; ``overrides`` are options by field name."""
    environment = os.environ if environment is None else environment
    here = Path.cwd()
    if isinstance(target, str) and target.lower().startswith("magnet:"):
        return merge({"magnet": target}, here, environment, overrides or {}, folder=here, file="the command line")
    path = Path(target)
    return merge(read_file(path), here / path.parent, environment, overrides or {}, folder=here, file=str(path))


def load_node(overrides: Mapping[str, object], environment: Mapping[str, str] | None = None) -> NodeConfig:
    """A node without a model, from options by field name and the environment."""
    here = Path.cwd()
    return _node({}, here, os.environ if environment is None else environment, overrides, "the command line", here)


def read_file(path: Path) -> dict[str, object]:
    """A TOML file as a dict; ConfigError if it cannot be read or is no TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"Cannot read {path} ({reason}); give a model.toml or a magnet link.") from error
    if len(content) > MAX_FILE:
        raise ConfigError(f"{path} is too large for a model.toml; give a model.toml or a magnet link.")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file; give a model.toml or a magnet link.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def merge(
    document: Mapping[str, object],
    base: Path,
    environment: Mapping[str, str],
    overrides: Mapping[str, object],
    *,
    folder: Path,
    file: str = "model.toml",
) -> Settings:
    """Merge the three sources; an option beats the environment, which beats the file, which beats the default.

    ``base`` is the folder that the file's relative paths start from, ``folder`` (the working directory)
    the one of all others. An override of None means that the option was not given. Lists replace each other, they do
    not add up. Raises ConfigError with the key, its table and the nearest right one.
    """
    _check_keys(document, "", file)
    magnet = document.get("magnet")
    model = _table(document, "model", file)
    if (magnet is None) == (model is None):
        raise ConfigError(
            f"{file} must name one model: either a [model] table with a source to publish, or a magnet to join."
        )
    if magnet is not None and (not isinstance(magnet, str) or not magnet.lower().startswith("magnet:?")):
        raise ConfigError(f'magnet in {file} must be a link that begins with "magnet:?", not {_shown(magnet)}.')
    recipe = None if model is None else _recipe(model, base, file)
    node = _node(_table(document, "node", file) or {}, base, environment, overrides, file, folder)
    return Settings(recipe, magnet, node, _adapters(document.get("adapter", []), base, file))


def _recipe(model: Mapping[str, object], base: Path, file: str) -> Recipe:
    _check_keys(model, "model", file)
    source = _table(model, "source", file, "model.source") or {}
    _check_keys(source, "model.source", file)
    split = _table(model, "split", file, "model.split") or {}
    _check_keys(split, "model.split", file)
    values: dict[str, Any] = {}
    tables = (
        (model, "model", MODEL_KEYS),
        (source, "model.source", SOURCE_KEYS),
        (split, "model.split", SPLIT_KEYS),
    )
    for table, label, kinds in tables:
        for name in kinds.keys() & table.keys():
            values[name] = _read(kinds[name], table[name], base, f"{name} in [{label}] of {file}")
    if "name" not in values:
        raise ConfigError(f'[model] in {file} has no name; add name = "…", the model\'s name for everybody.')
    given = [name for name in ("folder", "gguf", "package", "config") if name in values]
    if len(given) != 1:
        raise ConfigError(
            f"[model.source] in {file} must have exactly one of folder, gguf, package and config"
            f" (it has {' and '.join(given) or 'none of them'})."
        )
    if values.get("consume") and "folder" not in values:
        raise ConfigError(f"consume in [model.source] of {file} is for a folder; other sources are left alone.")
    if ("package" in values) != ("file" in values):
        raise ConfigError(f"[model.source] in {file} must have package and file together, or neither.")
    return Recipe(**values)


def _adapters(tables: object, base: Path, file: str) -> tuple[AdapterRecipe, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"adapter in {file} must be tables, [[adapter]] each, not {_shown(tables)}.")
    recipes = []
    for table in tables:
        _check_keys(table, "adapter", file)
        if missing := [name for name in ADAPTER_KEYS if name not in table]:
            raise ConfigError(f'an [[adapter]] in {file} has no {missing[0]}; add {missing[0]} = "…".')
        values = {
            name: _read(kind, table[name], base, f"{name} in [[adapter]] of {file}")
            for name, kind in ADAPTER_KEYS.items()
        }
        recipes.append(AdapterRecipe(**values))
    return tuple(recipes)


def _node(
    table: Mapping[str, object],
    base: Path,
    environment: Mapping[str, str],
    overrides: Mapping[str, object],
    file: str,
    folder: Path,
) -> NodeConfig:
    _check_keys(table, "node", file)
    _check_variables(environment)
    if unknown := set(overrides) - set(NODE_KEYS):
        raise ConfigError(_unknown(min(unknown), "node", "the options"))
    values: dict[str, Any] = {"data": default_data(environment)}
    for name, kind in NODE_KEYS.items():
        variable = variable_of(name)
        if overrides.get(name) is not None:
            option = "--" + ("peer" if name == "peers" else name.replace("_", "-"))
            values[name] = _read(kind, overrides[name], folder, option)
        elif environment.get(variable):
            text = kind.from_text(environment[variable].strip())
            values[name] = _read(kind, text, folder, variable)
        elif name in table:
            values[name] = _read(kind, table[name], base, f"{name} in [node] of {file}")
    return NodeConfig(**values)


def variable_of(name: str) -> str:
    """The environment variable for a key of [node]."""
    return f"TORRENTLM_{name.upper()}"


def _table(parent: Mapping[str, object], name: str, file: str, label: str | None = None) -> Mapping[str, object] | None:
    table = parent.get(name)
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{name} in {file} must be a table, [{label or name}], not {_shown(table)}.")
    return table


def _read(kind: Kind, value: object, base: Path, where: str) -> Any:
    try:
        return kind.read(value, base)
    except ValueError as error:
        near = difflib.get_close_matches(str(value), kind.choices, 1, 0.5) if isinstance(value, str) else []
        hint = f'; did you mean "{near[0]}"?' if near else f" ({error})." if str(error) else "."
        raise ConfigError(f"{where} must be {kind.wants}, not {_shown(value)}{hint}") from error


def _shown(value: object) -> str:
    """A wrong value as a sentence names it, cut to a bearable length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return f"{_TYPE_NAMES.get(type(value), 'the value')} {text if len(text) <= 60 else text[:57] + '…'}"


def _check_keys(table: Mapping[str, object], label: str, file: str) -> None:
    for key in table:
        if key not in TABLES[label]:
            raise ConfigError(_unknown(key, label, file))


def _unknown(key: str, label: str, file: str) -> str:
    """The sentence for an unknown key: the nearest key of its own table, then of the others, else all of its own."""
    place = f" in [{label}]" if label else " at the top"
    start = f'Unknown key "{key}"{place} of {file}'
    if near := difflib.get_close_matches(key, TABLES[label], 1):
        return f'{start}; did you mean "{near[0]}"?'
    for other, keys in TABLES.items():
        if near := difflib.get_close_matches(key, keys, 1, 0.8):
            where = f"in [{other}]" if other else "at the top"
            return f'{start}; did you mean "{near[0]}" {where}?'
    return f"{start}; the keys there are {_listed(TABLES[label])}."


def _check_variables(environment: Mapping[str, str]) -> None:
    known = [variable_of(name) for name in (*NODE_KEYS, *OTHER_VARIABLES)]
    for name in sorted(environment):
        if name.startswith("TORRENTLM_") and name not in known and not name.startswith("TORRENTLM_TEST_"):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {_listed(known)}."
            raise ConfigError(f"Unknown environment variable {name}; {hint}")


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
