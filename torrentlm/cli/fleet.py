"""Other ``torrentlm seed`` processes, started here, heard here, and gone when this process is, however it ends.

Three things see to that: ``close`` terminates, then kills; Ctrl-C and the like are held back while a process starts or
``close`` runs; and every child asks the kernel to end with us (cli/parent.py), for the case that we are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torrentlm.cli.parent import VARIABLE
from torrentlm.cli.signals import exit_on, held_back
from torrentlm.errors import HolderLostError

PROGRAM = (sys.executable, "-m", "torrentlm", "seed")
GRACE_S = 8.0
"""How long processes have to stop by themselves before they are killed."""
LAST_WORDS = 4096
"""Bytes at the end of a log that are searched for its last line."""


class Fleet:
    """Seed processes by name. Use it in a ``with`` on the main thread; ``logs`` gets a file of stderr for each."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs = logs
        self._environment = environment | {VARIABLE: str(os.getpid())}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()

    def __enter__(self) -> Fleet:
        self._before = {number: signal.signal(number, exit_on) for number in (signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held_back():
            self.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def running(self) -> list[str]:
        return [name for name, process in self._processes.items() if process.poll() is None]

    def start(self, name: str, *arguments: str) -> None:
        """Start ``torrentlm seed ARGUMENTS --json`` in a session of its own, out of the terminal's Ctrl-C."""
        self._logs.mkdir(parents=True, exist_ok=True)
        with held_back(), self._log(name).open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  # this very program
                [*PROGRAM, *arguments, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
            self._processes[name] = process
        threading.Thread(target=self._listen, args=(name, process), name=f"events of {name}", daemon=True).start()

    def next_event(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        """The next event and whose it is, or None after ``timeout`` seconds; HolderLostError if a process ended."""
        try:
            name, event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if event is None:
            if name in self._processes:
                raise HolderLostError(f"{name} ended too early: {self._last_words(name)}")
            return self.next_event(timeout)
        return name, event

    def stop(self, *names: str) -> None:
        """End these processes and wait until they are gone; their end is no error any more."""
        leaving = [self._processes.pop(name) for name in names if name in self._processes]
        for process in leaving:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for process in leaving:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        """End all of them."""
        self.stop(*list(self._processes))

    def _listen(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        self._events.put((name, event))
        self._events.put((name, None))

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _last_words(self, name: str) -> str:
        log = self._log(name)
        with contextlib.suppress(OSError), log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_WORDS))
            lines = file.read().decode(errors="replace").split("\n")
            if words := next((line.strip() for line in reversed(lines) if line.strip()), ""):
                return words.removeprefix("torrentlm: ")
        return f"see {log}."


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the process's whole group, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
