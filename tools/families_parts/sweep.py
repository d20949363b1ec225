"""Every row in a child process of its own, with limits: a crash or a hang is a row and not the end."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
import transformers.generation
import transformers.models.llama.modeling_llama  # what every child would import anew
from check import Row, check
from whole import MAPPINGS

SECONDS = 60
MEMORY = 12 << 30
"""Bytes of address space, which an idle process with torch has several thousand million of already."""
RUNS = "the whole model runs"


def entries(only: frozenset[str] = frozenset()) -> list[tuple[str, str, str]]:
    """(kind, type, class) of all that transformers maps; ``only``: those with such a type, class, kind or kind:type."""
    every = [(kind, name, model) for kind, mapping in MAPPINGS.items() for name, model in mapping.items()]
    return [row for row in every if not only or only & {*row, f"{row[0]}:{row[1]}"}]


def rows(wanted: list[tuple[str, str, str]]) -> Iterator[Row]:
    """Check one after the other."""
    for kind, name, model in wanted:
        started = time.monotonic()
        row = _in_child(kind, name, model)
        row.seconds = round(time.monotonic() - started, 1)
        yield row


def _in_child(kind: str, name: str, model: str) -> Row:
    """A forked child finds torch and transformers imported, which takes seconds otherwise."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="torrentlm-families-") as folder:
        child = context.Process(target=_child, args=(theirs, kind, name, model, Path(folder)), daemon=True)
        child.start()
        theirs.close()
        try:
            return _listen(ours, Row(kind, name, model, "unbuildable"), time.monotonic() + SECONDS)
        finally:
            child.kill()
            child.join()
            ours.close()


def _listen(child: Connection, row: Row, deadline: float) -> Row:
    """The child's row, or what is to be said of one that gave none."""
    while True:
        if not child.poll(max(0.0, deadline - time.monotonic())):
            row.reason = f"took longer than {SECONDS} s"
            return row
        try:
            heard = child.recv()
        except (EOFError, OSError):
            row.reason = "the process crashed"
            return row
        if isinstance(heard, Row):
            return heard
        row.outcome = "wrong"  # the whole model has run: from here on it is the splitter's doing


def _child(parent: Connection, kind: str, name: str, model: str, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    parent.send(check(kind, name, model, folder, lambda: parent.send(RUNS)))
