"""Child processes: heard, stopped, and gone whatever happens to us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torrentlm.cli import fleet as module
from torrentlm.cli.fleet import Fleet
from torrentlm.cli.signals import held_back
from torrentlm.errors import HolderLostError

CHILD = """
import json, os, signal, sys, time
from torrentlm.cli.parent import end_with_parent
end_with_parent()
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(json.dumps({"event": "ready", "pid": os.getpid(), "arguments": sys.argv[1:]}), flush=True)
print("no json", flush=True)
if "fail" in sys.argv:
    sys.exit("torrentlm: this is why")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAM", (sys.executable, "-c", CHILD))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(*pids: int, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def pid_of(fleet: Fleet) -> int:
    found = fleet.next_event(20)
    assert found is not None
    return int(found[1]["pid"])


def test_events_come_with_the_name_and_all_end_with_the_block(tmp_path: Path):
    with Fleet(tmp_path, dict(os.environ)) as fleet:
        fleet.start("one", "a", "b")
        found = fleet.next_event(20)
        assert found is not None and found[0] == "one" and found[1]["arguments"] == ["a", "b", "--json"]
        assert fleet.next_event(0.1) is None
        assert fleet.running == ["one"]
        assert os.getsid(found[1]["pid"]) == found[1]["pid"]  # the terminal's Ctrl-C is not for it
    assert not alive(found[1]["pid"])


def test_a_process_that_ends_early_says_why(tmp_path: Path):
    with Fleet(tmp_path, dict(os.environ)) as fleet:
        fleet.start("one", "fail")
        pid_of(fleet)
        with pytest.raises(HolderLostError, match="one ended too early: this is why"):
            fleet.next_event(20)


def test_a_stopped_process_is_no_error(tmp_path: Path):
    with Fleet(tmp_path, dict(os.environ)) as fleet:
        fleet.start("one")
        pid = pid_of(fleet)
        fleet.stop("one")
        assert not alive(pid)
        assert fleet.next_event(0.5) is None


def test_who_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    with Fleet(tmp_path, dict(os.environ)) as fleet:
        fleet.start("one", "stubborn")
        fleet.start("two", "stubborn")
        pids = [pid_of(fleet), pid_of(fleet)]
    assert not any(map(alive, pids))


def test_an_exception_ends_them_too(tmp_path: Path):
    pid = 0
    with pytest.raises(KeyboardInterrupt), Fleet(tmp_path, dict(os.environ)) as fleet:
        fleet.start("one")
        pid = pid_of(fleet)
        raise KeyboardInterrupt
    assert not alive(pid)


PARENT = """
import sys, time
from pathlib import Path
from torrentlm.cli import fleet as module
module.PROGRAM = (sys.executable, "-c", sys.argv[2])
import os
with module.Fleet(Path(sys.argv[1]), dict(os.environ)) as fleet:
    for name in ("one", "two", "three"):
        fleet.start(name)
        print("started", flush=True)
    for _ in range(3):
        print(fleet.next_event(20)[1]["pid"], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("after", [1, 3, 6], ids=lambda lines: f"line{lines}")
def test_nobody_is_left_when_the_parent_ends(number: signal.Signals, after: int, tmp_path: Path):
    marker = f"marker-{os.getpid()}-{number}-{after}"
    command = [sys.executable, "-c", PARENT, str(tmp_path), CHILD + f"# {marker}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        for _ in range(after):
            parent.stdout.readline()
        assert processes_with(marker)
        parent.send_signal(number)
        parent.wait(20)
    deadline = time.monotonic() + 10
    while left := processes_with(marker):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


def processes_with(marker: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "cmdline").read_bytes() and alive(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_signals_are_held_back_and_not_lost():
    reached = False
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
