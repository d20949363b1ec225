"""Imports only go down: the order of docs/architecture.md, and what each package may know of the outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "torrentlm"

# A row may import from the rows above, a package from itself too; behind each name the third-party packages it knows.
ROWS: tuple[dict[str, set[str]], ...] = (
    {"errors": set(), "records": set(), "config": set(), "bencode": set(), "structured": set()},
    {"manifest": {"msgpack", "safetensors"}},
    {"wire": {"msgpack", "xxhash", "zstandard"}},
    {"route": {"numpy"}},
    {"compute": {"torch", "transformers", "safetensors", "trio"}},
    {"swarm": {"libtorrent", "trio", "cryptography", "msgpack"}},
    {"gateway": {"trio", "cryptography"}},
    {"publish": {"gguf", "numpy", "torch", "transformers"}},
    {"holder": {"trio", "torch", "transformers"}},
    {"client": {"trio", "numpy", "torch", "transformers"}},
    {"node": {"trio"}, "portal": {"trio"}},
    {"api": {"trio", "torch"}},
    {"__init__": set()},
    {"cli": {"click", "rich"}},
    {"__main__": set()},
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
KNOWS = {name: known for row in ROWS for name, known in row.items()}
TOGETHER = 0  # the first row's modules may import one another

PURE = {"errors", "records", "bencode", "wire", "route"}
IMPURE_STDLIB = {
    "asyncio", "http", "io", "multiprocessing", "os", "pathlib", "random", "secrets", "select", "selectors", "shutil",
    "socket", "ssl", "subprocess", "tempfile", "threading", "time", "urllib",
}  # fmt: skip
"""What a pure module cannot need: files, sockets, threads, the clock, chance."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """``torrentlm.wire.frames`` → ``wire``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts if parts == ("torrentlm", "__init__") or parts[-1] != "__init__" else parts[:-1])


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import statement, also those inside functions."""
    for statement in ast.walk(ast.parse(source)):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield statement.lineno, alias.name
        elif isinstance(statement, ast.ImportFrom):
            if statement.level:
                yield statement.lineno, "." * statement.level
            elif statement.module == "torrentlm":
                for alias in statement.names:
                    yield statement.lineno, f"torrentlm.{alias.name}"
            else:
                yield statement.lineno, statement.module or ""


def complaint(room: str, module: str) -> str | None:
    """Why ``room`` may not import ``module``; None if it may."""
    top = module.split(".")[0]
    if module.startswith("."):
        return "is relative; write it in full"
    if top == "torrentlm":
        target = room_of(module)
        if target not in RANK:
            return "is in no row of ROWS"
        if target == room or RANK[target] < RANK[room] or RANK[target] == RANK[room] == TOGETHER:
            return None
        return f"goes up: {target} is not above {room}"
    if top in sys.stdlib_module_names:
        return "is no business of a pure module" if room in PURE and top in IMPURE_STDLIB else None
    return None if top in KNOWS[room] else f"is third-party that {room} does not know"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_go_down(path: Path):
    room = room_of(name_of(path))
    assert room in RANK, f"{path.name} is in no row of ROWS"
    wrong = [
        f"{path}:{line}: import of {module} {why}"
        for line, module in imports_of(path.read_text())
        if (why := complaint(room, module))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "source", "says"),
    [
        ("wire", "import torrentlm.gateway.pipes", "goes up"),
        ("wire", "from torrentlm import node", "goes up"),
        ("wire", "def f():\n    from torrentlm.swarm import session", "goes up"),
        ("wire", "import socket", "pure"),
        ("wire", "import trio", "third-party"),
        ("wire", "from . import frames", "relative"),
        ("errors", "import torrentlm", "goes up"),
        ("gateway", "from torrentlm.attic import thing", "no row"),
        ("holder", "from torrentlm.client import session", "goes up"),
    ],
)
def test_the_check_sees_what_is_wrong(room: str, source: str, says: str):
    [(_, module)] = imports_of(source)
    assert says in (complaint(room, module) or "")


def test_nothing_here_unpickles_or_trusts_remote_code():
    for path in MODULES:
        modules = {module.split(".")[0] for _, module in imports_of(path.read_text())}
        assert not modules & {"pickle", "marshal", "shelve", "dill"}, path


@pytest.mark.parametrize("module", ["torrentlm", "torrentlm.cli.main", "torrentlm.cli.commands", "torrentlm.config"])
def test_the_light_end_stays_light(module: str):
    """Importing the package or the command line loads none of the heavy libraries."""
    heavy = ("torch", "transformers", "libtorrent", "numpy", "rich", "trio")
    script = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == []
