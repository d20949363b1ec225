"""`torrentlm demo` with the real model: an answer, a chat, and nobody left behind whenever it is ended."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import TORRENTLM, Terminal, assert_nobody_left, processes_with
from torrentlm.manifest.magnet import Magnet

ROOT = Path(__file__).parents[2]
PROMPT = "Write a very long story."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One data folder for all: empty at the first test, full from then on."""
    folder = tmp_path_factory.mktemp("demo")
    yield folder
    for pid in processes_with(str(folder)):
        subprocess.run(["kill", "-9", str(pid)], check=False)


@pytest.mark.timeout(600)
def test_the_first_run_answers_one_prompt(data: Path):
    found = subprocess.run(
        [*TORRENTLM, "demo", "What is the capital of France?", "--data", str(data)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    magnet = Magnet.parse(re.search(r"magnet:\?\S+", found.stdout)[0])
    known = Magnet.parse((ROOT / "torrents" / "smollm2-135m-instruct.magnet").read_text())
    assert (magnet.v1, magnet.v2) == (known.v1, known.v2)
    holders = re.findall(r"^holder-(\d)  127\.0\.0\.1:(\d+)  blocks (\S+)$", found.stdout, flags=re.MULTILINE)
    assert [(number, blocks) for number, _, blocks in holders] == [("1", "0-10"), ("2", "11-20"), ("3", "21-31")]
    assert [str(peer.port) for peer in magnet.peers] == [port for _, port, _ in holders]
    assert "Paris" in found.stdout
    assert re.search(r"\d tokens/s", found.stdout)
    assert_nobody_left(str(data))
    sizes = [sum(path.stat().st_size for path in (data / f"holder-{n}" / "blocks").iterdir()) for n in (1, 2, 3)]
    assert max(sizes) < 300_000_000 < sum(sizes)


@contextlib.contextmanager
def demo_on_a_terminal(data: Path) -> Iterator[Terminal]:
    terminal = Terminal(*TORRENTLM, "demo", "--data", str(data))
    with contextlib.closing(terminal):
        yield terminal


def test_the_second_run_is_quick_and_chats(data: Path):
    begun = time.monotonic()
    with demo_on_a_terminal(data) as terminal:
        terminal.wait_for("/quit leaves.", 120)
        assert time.monotonic() - begun < 90  # some 20 s where nothing else runs
        terminal.wait_for("> ")
        terminal.type("Count from 1 to 5.\r")
        terminal.wait_for("tokens/s")
        terminal.type("/route\r")
        terminal.wait_for("blocks 21-31")
        terminal.wait_for("> ")
        terminal.type(f"{PROMPT}\r")
        terminal.wait_for(PROMPT)
        time.sleep(2)
        terminal.interrupt()
        terminal.wait_for("[stopped]", 10)
        terminal.wait_for("> ")
        assert len(processes_with(str(data))) == 4
        terminal.type("What is the capital of France?\r")
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type("/quit\r")
        assert terminal.wait() == 0
    assert_nobody_left(str(data))


def started(data: Path, name: str) -> Callable[[str], bool]:
    return lambda output: bool(processes_with(str(data / name)))


def has_open(path: Path) -> bool:
    """Whether a process has ``path`` open, among those that name its folder on their command line."""
    for pid in processes_with(str(path.parent)):
        with contextlib.suppress(OSError):  # gone meanwhile
            if any(link.resolve() == path for link in Path(f"/proc/{pid}/fd").iterdir()):
                return True
    return False


MOMENTS: dict[str, Callable[[Path], Callable[[str], bool]]] = {
    # Not before our first line runs: until then Python itself answers; tests/unit/cli/test_main.py has our imports.
    "at once": lambda data: lambda output: has_open(data / "lock"),
    "publishing": lambda data: started(data, "publisher"),
    "holders starting": lambda data: started(data, "holder-3"),
    "connecting": lambda data: lambda output: "Magnet:" in output,
    "answering": lambda data: lambda output: output.count(PROMPT) == 1 and len(output.split(PROMPT)[1].strip()) > 20,
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGINT) for moment in MOMENTS),
        ("holders starting", signal.SIGTERM),
        ("holders starting", signal.SIGKILL),
        ("answering", signal.SIGKILL),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value.replace(" ", "-"),
)
def test_ending_it_leaves_nobody(moment: str, number: signal.Signals, data: Path, tmp_path: Path):
    command = [*TORRENTLM, "demo", PROMPT, "--data", str(data)]
    output = tmp_path / "output"
    has_come = MOMENTS[moment](data)
    with (
        output.open("w") as stdout,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE) as demo,
    ):
        assert demo.stderr is not None
        deadline = time.monotonic() + 240
        while not has_come(output.read_text()):
            assert demo.poll() is None and time.monotonic() < deadline, demo.stderr.read()
            time.sleep(0.02)
        time.sleep(0.2)
        demo.send_signal(number)
        status = demo.wait(30)
        errors = demo.stderr.read().decode()
    assert_nobody_left(str(data))
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], errors
    assert "Traceback" not in errors


def test_ctrl_c_typed_at_the_prompt(data: Path):
    with demo_on_a_terminal(data) as terminal:
        terminal.wait_for("> ", 120)
        terminal.interrupt()
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.output
    assert_nobody_left(str(data))


def test_two_demos_do_not_share_a_folder(data: Path):
    import fcntl

    with (data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = subprocess.run(
            [sys.executable, "-m", "torrentlm", "demo", "x", "--data", str(data)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert found.returncode == 1
    assert found.stderr.startswith("torrentlm: Another demo runs")
