"""torrentlm processes as a person starts them: real, separate, and all gone at a test's end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TORRENTLM = (sys.executable, "-m", "torrentlm")


def run(*arguments: str, timeout: float = 120, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        [*TORRENTLM, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout, check=False
    )


class Seed:
    """``torrentlm seed … --json`` on loopback with a data folder of its own."""

    def __init__(self, model: str, data: Path, *options: str) -> None:
        data.parent.mkdir(parents=True, exist_ok=True)
        self._log = data.with_name(data.name + ".log")
        common = ("--data", str(data), "--host", "127.0.0.1", "--port", "0", "--json")
        bootstrap = () if "--dht-bootstrap" in options else ("--dht-bootstrap", "none")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*TORRENTLM, "seed", model, *common, *bootstrap, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.events.put(json.loads(line))
        self.events.put(None)

    def wait_for(self, name: str, timeout: float = 120) -> dict[str, Any]:
        """The next event of this name."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            assert event is not None, f"ended before it said {name}: {self._log.read_text()}"
            if event["event"] == name:
                return event

    @property
    def errors(self) -> str:
        return self._log.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM, timeout: float = 20) -> int:
        """Signal it and return its exit status; a process that does not end in time fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)

    def __enter__(self) -> Seed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


class Terminal:
    """A command on a pseudo-terminal that is its controlling one, so that typing Ctrl-C works as for a person."""

    def __init__(self, *command: str) -> None:
        self.output = ""
        pid, self._master = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(command[0], command)
        self.pid = pid
        self.status: int | None = None

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        time.sleep(0.3)  # readline notices a signal only while it waits for a key
        self.type("\x03")

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Read until ``text`` has come; return what came before it and forget both."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come, only {self.output!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    self.output += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # how Linux says that nobody is on the other side
                    raise AssertionError(f"ended before {text!r} came: {self.output!r}") from None
        before, self.output = self.output.split(text, 1)
        return before

    def wait(self, timeout: float = 30) -> int:
        """Its exit status, negative for a signal; reads on meanwhile, as a terminal does."""
        deadline = time.monotonic() + timeout
        while self.status is None:
            assert time.monotonic() < deadline, f"did not end; it said {self.output!r}"
            with contextlib.suppress(OSError):
                if select.select([self._master], [], [], 0.05)[0]:
                    self.output += os.read(self._master, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)


def processes_with(text: str) -> list[int]:
    """Live processes of this machine, other than this one, with ``text`` on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and text.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def assert_nobody_left(text: str, timeout: float = 15) -> None:
    deadline = time.monotonic() + timeout
    while left := processes_with(text):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)
