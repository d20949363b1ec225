"""Code that travels with a model: which files it is, its hash, and running it where the operator allows that hash.

Theory of operation. A model that transformers does not know brings modules of its own: config.json's ``auto_map`` names
classes in files beside it. The publisher collects those files and what they import from one another; they lie in the
model torrent, in its own folder. A reader takes every module of that folder, hashes them, and asks its operator's list
before it so much as parses one. What is run is the very bytes that were hashed, from memory: nothing is fetched from a
hub, and nothing is copied into a cache of modules where it could change. Allowed code may do all that this program may.

Needs no torch until code is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torrentlm.errors import ArtifactError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_FILES = 32
MAX_BYTES = 1 << 20
"""Of all files together."""
MAX_SETTINGS = 1 << 20
PACKAGE = "torrentlm_custom_code"

_CONFIG, _MODEL = "AutoConfig", "AutoModel"
_MODEL_ORDER = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
_REFERENCE = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})\.([A-Za-z_][A-Za-z0-9_]{0,63})")
_FILE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\.py")


@dataclass(frozen=True)
class CustomCode:
    """``files``: name to content, all beside config.json. ``classes``: "AutoConfig", "AutoModel…" to "module.Class"."""

    files: Mapping[str, bytes]
    classes: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of what ``sha256sum`` says of the files in the order of their names."""
        lines = (f"{hashlib.sha256(self.files[name]).hexdigest()}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def require_allowed(self, allowed: Collection[str]) -> None:
        """Raise UnsupportedModelError unless the operator allows exactly these files."""
        if self.digest not in allowed:
            raise UnsupportedModelError(
                f"this model runs code of its own ({', '.join(sorted(self.files))}), which is not run unless you allow "
                f'it: read it, and if you trust it set allow_code = ["{self.digest}"] under [node] in model.toml, or '
                f"--allow-code {self.digest}"
            )

    def load(self) -> dict[str, type]:
        """Run the modules and return the classes by the names of ``classes``. Only after :meth:`require_allowed`.

        Raises UnsupportedModelError for code that does not run here or does not have them.
        """
        package = _install(self)
        found = {}
        for auto, reference in self.classes.items():
            module, _, name = reference.partition(".")
            try:
                found[auto] = getattr(importlib.import_module(f"{package}.{module}"), name)
            except Exception as error:  # it can fail in any way
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise UnsupportedModelError(
                    f"this model's own code cannot be loaded ({reason}): install what it needs, in the version that it "
                    "was written for"
                ) from error
            if not isinstance(found[auto], type):
                raise UnsupportedModelError(f"{reference} in this model's own code is no class")
        return found


def collect(folder: Path, settings: Mapping[str, Any]) -> CustomCode | None:
    """For a publisher: the code that a checkpoint's ``settings`` (config.json) need; None if transformers has it all.

    Raises ArtifactError for a file that is missing, no Python, or too large, and for names that are no files of this
    ``folder``.
    """
    classes = _classes(settings)
    if not classes or _known(settings):
        return None
    files: dict[str, bytes] = {}
    waiting = sorted({reference.partition(".")[0] for reference in classes.values()})
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in files:
            continue
        _check_name(name)
        files[name] = _read(folder / name, files)
        waiting += _relative_imports(name, files[name], folder)
    return CustomCode(files, classes)


def stored(folder: Path, settings: Mapping[str, Any]) -> CustomCode | None:
    """For a reader: the code in a model torrent's ``folder``, none of it parsed; None if config.json names none.

    Raises ArtifactError for names that are no files there, and for too many or too large ones.
    """
    classes = _classes(settings)
    if not classes:
        return None
    files: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.py")):
        _check_name(path.name)
        files[path.name] = _read(path, files)
    for reference in classes.values():
        if (name := f"{reference.partition('.')[0]}.py") not in files:
            raise ArtifactError(f"auto_map in config.json names {name}, which is not beside it: get the whole model")
    return CustomCode(files, classes)


def require_allowed(folder: Path, allowed: Collection[str]) -> None:
    """Raise UnsupportedModelError if the model in ``folder`` has code that is not in ``allowed``. Cheap."""
    code = stored(folder, read_settings(folder))
    if code is not None:
        code.require_allowed(allowed)


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as a dict; an empty one where it is no such thing, which others then complain about."""
    try:
        with (folder / "config.json").open("rb") as file:
            settings = json.loads(file.read(MAX_SETTINGS + 1))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def own_config(code: CustomCode, folder: Path, settings: Mapping[str, Any]) -> PretrainedConfig:
    """The config in ``folder``, of a class that knows the model's own classes, see :func:`own_class`. Runs the code.

    Raises UnsupportedModelError.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

    classes = code.load()
    named = settings.get("model_type")
    kind: Any = classes.pop(_CONFIG, None)
    if kind is None and isinstance(named, str) and named in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[named]
    if kind is None or not issubclass(kind, PretrainedConfig):
        raise UnsupportedModelError("this model's own code has no config class: auto_map must name one as AutoConfig")
    if not all(issubclass(model, PreTrainedModel) for model in classes.values()):
        raise UnsupportedModelError("auto_map in config.json must name model classes of transformers' kind")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)

    own: Any = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__, "own_classes": classes})
    try:
        config = own.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the code can fail in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UnsupportedModelError(f"this model's own code cannot read its config.json ({reason})") from error
    if hasattr(config, "auto_map"):
        del config.auto_map  # transformers would look for the code by itself
    return config


def own_class(config: PretrainedConfig) -> Any:
    """The model class that came with the model: the one that ``config.architectures`` names, else by transformers'
    order of tasks. None for a model without code of its own.
    """
    classes: Mapping[str, type] = getattr(type(config), "own_classes", {})
    by_name = {kind.__name__: kind for kind in classes.values()}
    for name in config.architectures or ():
        if name in by_name:
            return by_name[name]
    return next((classes[auto] for auto in (*_MODEL_ORDER, *classes) if auto in classes), None)


def _classes(settings: Mapping[str, Any]) -> dict[str, str]:
    """What auto_map says of config and models; tokenizers and processors are not run from code."""
    named = settings.get("auto_map")
    if not isinstance(named, dict):
        return {}
    found = {key: value for key, value in named.items() if key == _CONFIG or str(key).startswith(_MODEL)}
    for value in found.values():
        if not isinstance(value, str) or not _REFERENCE.fullmatch(value):
            raise ArtifactError(
                f"auto_map in config.json names {str(value)[:80]!r}: it must be module.Class, of a file beside it"
            )
    return found if any(key != _CONFIG for key in found) else {}


def _known(settings: Mapping[str, Any]) -> bool:
    """Whether transformers itself has what ``settings`` describe: code beside them is then not needed."""
    import transformers

    kind, named = settings.get("model_type"), settings.get("architectures") or []
    return (
        isinstance(kind, str)
        and kind in transformers.CONFIG_MAPPING
        and all(isinstance(name, str) and name.isidentifier() and hasattr(transformers, name) for name in named)
    )


def _check_name(name: str) -> None:
    if not _FILE.fullmatch(name):
        raise ArtifactError(
            f"{name[:80]!r} cannot be the name of a model's own code: it must be a module beside config.json"
        )


def _read(path: Path, others: Mapping[str, bytes]) -> bytes:
    room = MAX_BYTES - sum(map(len, others.values()))
    try:
        with path.open("rb") as file:
            content = file.read(room + 1)
    except OSError as error:
        raise ArtifactError(f"the model's own code cannot be read ({path}: {error.strerror}): get all of it") from error
    if len(content) > room or len(others) >= MAX_FILES:
        raise ArtifactError(
            f"the model's own code is more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB: it is not published"
        )
    return content


def _relative_imports(name: str, content: bytes, folder: Path) -> Iterator[str]:
    """Modules of the same folder that a module imports relatively."""
    try:
        tree = ast.parse(content, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{name} beside config.json is no Python that runs here: {error}") from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level > 1 or "." in (node.module or ""):
            raise ArtifactError(f"{name} imports from another folder (line {node.lineno}): code must be in one folder")
        if node.module:
            yield node.module
        else:
            yield from (alias.name for alias in node.names if (folder / f"{alias.name}.py").is_file())


# --- Running it from memory. ------------------------------------------------------------------------------------------

_installing = threading.Lock()
_packages: dict[str, Mapping[str, bytes]] = {}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of loaded code; they are sources in memory."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = fullname.rpartition(".")
        if fullname == PACKAGE or (package == PACKAGE and fullname in _packages):
            return importlib.util.spec_from_loader(fullname, _Source(b""), is_package=True)
        source = _packages.get(package, {}).get(f"{module}.py")
        return None if source is None else importlib.util.spec_from_loader(fullname, _Source(source))


class _Source(importlib.abc.ExecutionLoader):
    def __init__(self, source: bytes) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)

    def get_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".py"  # for tracebacks; there is no such file

    def is_package(self, fullname: str) -> bool:
        return not self._source and (fullname == PACKAGE or fullname in _packages)


def _install(code: CustomCode) -> str:
    """Make the files importable; the package's name, one for each digest."""
    package = f"{PACKAGE}.sha256_{code.digest}"
    with _installing:
        if not _packages:
            sys.meta_path.append(_Finder())
        _packages[package] = code.files
    return package
