"""The commands ``ip`` and ``tc``, and the names of the network namespaces that belong to labs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
COMMAND_S = 20.0
GONE_S = 5.0
_PREFIX = "netlab-"
_NAME = re.compile(rf"{_PREFIX}(\d+)-")
_MISSING_RIGHTS = ("not permitted", "Permission denied")


class LabError(RuntimeError):
    """The lab cannot be built or used; the message is one sentence that says what to do."""


def command(*words: str) -> str:
    """Run ``ip`` or ``tc`` and return what it prints. Raises LabError."""
    environment = os.environ | {"PATH": PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise LabError(f"the command {words[0]} is missing: install it (Debian's package iproute2)") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(words)} took more than {COMMAND_S:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).partition("\n")[0]
        if any(text in said for text in _MISSING_RIGHTS):
            raise LabError(
                f"making network namespaces needs root, with the right to mount and to set up networks ({said})"
            )
        raise LabError(f"{' '.join(words)} failed: {said}")
    return done.stdout


def may_build() -> str | None:
    """Why no lab can be built here, None if one can."""
    name = namespace("try", "out")
    try:
        command("ip", "netns", "add", name)
        command("ip", "netns", "delete", name)
    except LabError as error:
        return str(error)
    return None


def namespace(lab: str, name: str) -> str:
    """The namespace of a lab's host; it names the process that has to remove it."""
    return f"{_PREFIX}{os.getpid()}-{lab}-{name}"


def namespaces() -> list[str]:
    """Those of all labs of this machine."""
    found: list[dict[str, Any]] = json.loads(command("ip", "-json", "netns", "list") or "[]")
    return [entry["name"] for entry in found if _NAME.match(entry["name"])]


def stale() -> list[str]:
    """Namespaces whose lab's process is gone: it was killed before it could tidy up."""
    owners = {name: int(_NAME.match(name)[1]) for name in namespaces()}  # type: ignore[index]
    return [name for name, owner in owners.items() if not Path(f"/proc/{owner}").exists()]


def remove(names: list[str]) -> None:
    """End every process in these namespaces, then remove them with all that they hold."""
    deadline = time.monotonic() + GONE_S
    while alive := {pid for name in names for pid in processes(name)}:
        if time.monotonic() > deadline:
            break  # the namespace goes when they do
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for name in names:
        with contextlib.suppress(LabError):  # another one may have removed it
            command("ip", "netns", "delete", name)


def processes(name: str) -> list[int]:
    """Ids of the processes in a namespace."""
    try:
        return [int(line) for line in command("ip", "netns", "pids", name).split()]
    except LabError:
        return []
