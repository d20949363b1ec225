"""`torrentlm demo` with the real model: an answer, a chat, and nobody left behind whenever it is ended."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import TORRENTLM, Terminal, assert_nobody_left, processes_with
from torrentlm.manifest.magnet import Magnet

ROOT = Path(__file__).parents[2]


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
    started = time.monotonic()
    with demo_on_a_terminal(data) as terminal:
        terminal.wait_for("/quit leaves.", 120)
        assert time.monotonic() - started < 60  # some 15 s where nothing else runs
        terminal.wait_for("> ")
        terminal.type("Count from 1 to 5.\r")
        terminal.wait_for("tokens/s")
        terminal.type("/route\r")
        terminal.wait_for("blocks 21-31")
        terminal.wait_for("> ")
        terminal.type("Write a very long story.\r")
        terminal.wait_for("story.")
        time.sleep(2)
        terminal.interrupt()
        terminal.wait_for("[stopped]", 10)
        terminal.wait_for("> ")
        assert len(processes_with(str(data))) == 4
        terminal.type("/quit\r")
        assert terminal.wait() == 0
    assert_nobody_left(str(data))


MOMENTS = {
    "at once": 0.3,
    "publisher starting": 2.5,
    "holders starting": 7.0,
    "soon ready": 11.0,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ending_it_leaves_nobody(moment: str, number: signal.Signals, data: Path):
    command = [*TORRENTLM, "demo", "Tell me a long story.", "--data", str(data)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as demo:
        assert demo.stderr is not None
        time.sleep(MOMENTS[moment])
        demo.send_signal(number)
        errors = demo.stderr.read().decode()
        status = demo.wait(20)
    assert_nobody_left(str(data))
    assert status in {signal.SIGINT: (130,), signal.SIGTERM: (143, -15), signal.SIGKILL: (-9,)}[number]
    assert "Traceback" not in errors


def test_ctrl_c_typed_during_the_answer_and_at_the_prompt(data: Path):
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
