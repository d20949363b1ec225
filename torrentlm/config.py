"""What the operator wrote: model.toml, ``TORRENTLM_*`` and command-line options, merged into one ``Settings``.

``merge`` is the whole decision, a function of its arguments; ``load`` reads the file and the environment
for it. Each key is a field of ``Recipe`` or ``NodeConfig`` and has a ``Kind`` that reads its value; docs/model-toml.md
explains each.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torrentlm.errors import ConfigError
from torrentlm.records import Endpoint, Span

_TYPE_NAMES = {int: "the number", float: "the number", str: "the text", list: "the list"}

PRECISIONS = ("auto", "F32", "BF16")
DTYPES = ("F32", "BF16", "F16")
TASKS = ("auto", "encoder")
MAX_FILE = 1 << 20
"""A model.toml is a page of text; more than this many bytes is some other file."""

Blocks = Literal["auto", "none"] | Span
"""Blocks to run: as many as fit, none (only seed the files), or exactly these."""


# --- Kinds of value. ``read`` takes what TOML gives and raises ValueError on anything else. ---------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value: what a sentence calls it, how to read it, and how its text form becomes the TOML form."""

    wants: str
    read: Callable[[Any, Path], Any]
    from_text: Callable[[str], object] = str
    choices: tuple[str, ...] = ()


def _text(value: object, base: Path) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError
    return value.strip()


def _path(value: object, base: Path) -> Path:
    if isinstance(value, Path):
        return base / value
    return base / Path(_text(value, base)).expanduser()


def _number(low: int, high: int) -> Callable[[object, Path], int]:
    def read(value: object, base: Path) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return read


def _seconds(value: object, base: Path) -> float:
    if type(value) not in (int, float) or not 1 <= float(str(value)) <= 86400:
        raise ValueError
    return float(str(value))


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Bytes meant by ``4000000``, ``"4GB"`` (decimal) or ``"512 MiB"`` (binary); ValueError for anything else."""
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"{value!r} is no size")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return parse_size(int(float(number) * (1024 if binary else 1000) ** power))


def _budget(value: object, base: Path) -> int | None:
    return None if value == "auto" else parse_size(value)


def _bound(value: object, base: Path) -> int:
    return 0 if value == "off" else parse_size(value)


def _threads(value: object, base: Path) -> int | None:
    return None if value == "auto" else _number(1, 1024)(value, base)


def _choice(choices: tuple[str, ...]) -> Callable[[object, Path], str]:
    def read(value: object, base: Path) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return read


def _hashes(value: object, base: Path) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError
    hashes = tuple(item.strip().lower() for item in value)
    if not all(re.fullmatch("[0-9a-f]{64}", item) for item in hashes):
        raise ValueError
    return hashes


def _flag(value: object, base: Path) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _flag_word(text: str) -> object:
    return {"true": True, "false": False}.get(text.lower(), text)


def _texts(value: object, base: Path) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError  # noqa: TRY004  # as all of these do
    return tuple(_text(item, base) for item in value)


def _endpoints(value: object, base: Path) -> tuple[Endpoint, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | Endpoint) for item in value):
        raise ValueError
    return tuple(item if isinstance(item, Endpoint) else Endpoint.parse(item) for item in value)


def _bootstrap(value: object, base: Path) -> tuple[Endpoint, ...] | None:
    words = [value] if isinstance(value, str) else value
    if words == ["public"] or words == ("public",):
        return None
    return () if words == ["none"] or words == ("none",) else _endpoints(value, base)


def _blocks(value: object, base: Path) -> Blocks:
    if isinstance(value, Span) or value == "auto" or value == "none":
        return value
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", value) if isinstance(value, str) else None
    if not match:
        raise ValueError
    return Span(int(match[1]), int(match[2] or match[1]))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _bootstrap_words(text: str) -> object:
    return text if text in ("public", "none") else _words(text)


def _integer(text: str) -> object:
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def _decimal(text: str) -> object:
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) else text


_TEXT = Kind("a short text", _text)
_PATH = Kind("a path", _path)
_BUDGET = Kind('a size such as "4GB" or "512 MiB", a number of bytes, or "auto"', _budget, _integer)
_BOUND = Kind('a size such as "200MB", a number of bytes, or "off"', _bound, _integer, ("off",))
_PORT = Kind("a whole number from 0 (any free port) to 65535", _number(0, 65535), _integer)
_COUNT = Kind("a whole number from 1 to 1024", _number(1, 1024), _integer)
_THREADS = Kind('a whole number from 1 to 1024, or "auto"', _threads, _integer, ("auto",))
_SECONDS = Kind("a number of seconds from 1 to 86400", _seconds, _decimal)
_ENDPOINTS = Kind('a list of "HOST:PORT"', _endpoints, _words)
_BOOTSTRAP = Kind('a list of "HOST:PORT", "public" or "none"', _bootstrap, _bootstrap_words, ("public", "none"))
_HASHES = Kind("a list of SHA-256 hashes, 64 hexadecimal digits each", _hashes, _words)
_BLOCKS = Kind('"auto", "none" or a range such as "0-10"', _blocks, str, ("auto", "none"))
_PRECISION = Kind("one of " + ", ".join(map(repr, PRECISIONS)), _choice(PRECISIONS), str, PRECISIONS)
_FLAG = Kind("true or false", _flag, _flag_word)
_SEED = Kind("a whole number from 0 up", _number(0, 2**63 - 1), _integer)
_TEXTS = Kind("a list of texts", _texts, _words)
_TASK = Kind("one of " + ", ".join(map(repr, TASKS)), _choice(TASKS), str, TASKS)
_DTYPE = Kind("one of " + ", ".join(map(repr, DTYPES)), _choice(DTYPES), str, DTYPES)


# --- What a Settings holds. -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to publish a model: tables [model] and [model.source].

    The weights come from exactly one of ``folder`` (a Hugging Face checkpoint), ``gguf`` (a file), ``package`` with
    ``file`` (a file in an installed Python package: a GGUF, or a checkpoint's config.json), or ``config`` (a
    config.json alone: random weights, those of ``seed``). ``dtype`` None: the checkpoint's own precision (GGUF: fp32).

    ``layer_stacks``, ``task``, ``replay`` and ``chunks`` say how to split what cannot be split by looking at it, see
    docs/model-toml.md.
    ``tokenizer``: refuse a model that has none; ``allow_nan``: do not refuse weights that are NaN or infinite.
    ``consume``: remove the folder's weight files once they are published.
    """

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    package: str | None = None
    file: str | None = None
    config: Path | None = None
    seed: int = 0
    layers_per_block: int = 1
    dtype: str | None = None
    tokenizer: bool = True
    allow_nan: bool = False
    consume: bool = False
    layer_stacks: tuple[str, ...] = ()
    task: str = "auto"
    replay: bool = False
    chunks: bool = True


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """An adapter to publish, a table [[adapter]]: a PEFT ``folder`` made for the model that the file names."""

    name: str
    folder: Path


def default_data(environment: Mapping[str, str] = os.environ) -> Path:
    """``torrentlm`` in the XDG data folder."""
    folder = Path(environment.get("XDG_DATA_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".local" / "share") / "torrentlm"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """How this node runs: table [node]. Sizes in bytes; a budget of None is what the machine has free at the start.

    ``dht_bootstrap`` None: the public nodes; (): none, so that the DHT starts from known peers alone. ``port`` 0: any
    free one. ``threads`` None: one per core. ``lease``: seconds after which an idle session's memory is freed.
    ``allow_code``: hashes of the code of its own that a model may run here.
    ``adapters``: bytes of adapters that sessions may bring along, 0 to apply none.
    ``recheck``: compare a block with a recorded sample before any is served.
    """

    data: Path = field(default_factory=default_data)
    host: str = "0.0.0.0"  # noqa: S104  # a peer is there for others
    port: int = 6881
    peers: tuple[Endpoint, ...] = ()
    dht_bootstrap: tuple[Endpoint, ...] | None = None
    blocks: Blocks = "auto"
    ram: int | None = None
    vram: int | None = None
    disk: int | None = None
    precision: str = "auto"
    threads: int | None = None
    lease: float = 60.0
    allow_code: tuple[str, ...] = ()
    adapters: int = 0
    recheck: bool = True


@dataclass(frozen=True, slots=True)
class Settings:
    """A model to publish (``recipe``) or to join (``magnet``), the node to do it with, and adapters to publish."""

    recipe: Recipe | None = None
    magnet: str | None = None
    node: NodeConfig = field(default_factory=NodeConfig)
    adapters: tuple[AdapterRecipe, ...] = ()


MODEL_KEYS = {"name": _TEXT, "layers_per_block": _COUNT, "dtype": _DTYPE, "tokenizer": _FLAG, "allow_nan": _FLAG}
SOURCE_KEYS = {
    "folder": _PATH,
    "gguf": _PATH,
    "package": _TEXT,
    "file": _TEXT,
    "config": _PATH,
    "seed": _SEED,
    "consume": _FLAG,
}
SPLIT_KEYS = {"layer_stacks": _TEXTS, "task": _TASK, "replay": _FLAG, "chunks": _FLAG}
ADAPTER_KEYS = {"name": _TEXT, "folder": _PATH}
NODE_KEYS = {
    "data": _PATH,
    "host": _TEXT,
    "port": _PORT,
    "peers": _ENDPOINTS,
    "dht_bootstrap": _BOOTSTRAP,
    "blocks": _BLOCKS,
    "ram": _BUDGET,
    "vram": _BUDGET,
    "disk": _BUDGET,
    "precision": _PRECISION,
    "threads": _THREADS,
    "lease": _SECONDS,
    "allow_code": _HASHES,
    "adapters": _BOUND,
    "recheck": _FLAG,
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


# --- Reading and merging. ---------------------------------------------------------------------------------------------


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
