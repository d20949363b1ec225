"""The lab of network namespaces, for real: addresses, rates in each direction, no way out, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from netlab_parts import kernel
from netlab_parts.lab import PAYLOAD, Lab, LabError, measured_rate

TOOLS = Path(__file__).parents[3] / "tools"
EXACT = 0.2
"""How far a busy machine may stay below a rate; above it, a hundredth."""
RATE = 20_000_000

may = kernel.may_build() is None
pytestmark = pytest.mark.skipif(not may, reason="network namespaces need root")


def of_this_process() -> list[str]:
    return [name for name in kernel.namespaces() if f"-{os.getpid()}-" in name]


def test_each_direction_has_its_own_rate() -> None:
    with Lab() as lab:
        slow_up = lab.add_host("slow-up", up=RATE, down=4 * RATE)
        other = lab.add_host("other")
        for sender, receiver, rate in ((slow_up, other, RATE), (other, slow_up, 4 * RATE)):
            payload = measured_rate(sender, receiver, seconds=1)
            assert (1 - EXACT) * rate * PAYLOAD < payload < 1.01 * rate
        slow_up.limit(up=2 * RATE)
        assert measured_rate(slow_up, other, seconds=1) > 1.5 * RATE
        up, down = slow_up.traffic()
        assert up > RATE / 8
        assert down > RATE / 8
    assert of_this_process() == []


def test_there_is_no_way_out() -> None:
    with Lab() as lab:
        host = lab.add_host("alone")
        routes = host.run(["ip", "route"]).splitlines()
        assert len(routes) == 1
        assert routes[0].startswith(str(lab.subnet))
        links = {line.split(":")[1].strip().partition("@")[0] for line in host.run(["ip", "-o", "link"]).splitlines()}
        assert {"lo", "eth0"} <= links
        reach = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
        with pytest.raises(LabError, match="unreachable"):
            host.run([sys.executable, "-c", reach])


def test_a_process_that_ignores_its_end_is_gone_with_the_lab() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    with pytest.raises(ZeroDivisionError), Lab() as lab:
        lab.grace = 0.2
        process = lab.add_host("host").start([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()
    assert of_this_process() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(number: signal.Signals) -> None:
    process = lab_process()
    process.send_signal(number)
    assert process.wait(20) != 0
    assert not [name for name in kernel.namespaces() if f"-{process.pid}-" in name]


def test_what_a_killed_lab_left_is_removed_by_the_next() -> None:
    process = lab_process()
    process.kill()
    process.wait()
    left = [name for name in kernel.namespaces() if f"-{process.pid}-" in name]
    assert len(left) == 2
    assert any(kernel.processes(name) for name in left)
    with Lab():
        assert not set(left) & set(kernel.namespaces())


def lab_process() -> subprocess.Popen[str]:
    """A lab with one host and a process in it, in a process of its own, once it stands."""
    code = (
        "import time; from netlab_parts.lab import Lab\n"
        "with Lab() as lab:\n"
        "    lab.add_host('host').start(['sleep', '600'])\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "up\n"
    return process


def test_names_and_addresses_are_limited() -> None:
    with Lab(subnet="10.9.8.0/30") as lab:
        first = lab.add_host("one")
        assert first.address == "10.9.8.1"
        for name in ("one", "bridge", "../x", "Big", "thirteen-char"):
            with pytest.raises(LabError, match="host's name"):
                lab.add_host(name)
        lab.add_host("two")
        with pytest.raises(LabError, match="no address left"):
            lab.add_host("three")


def test_a_failing_program_is_named() -> None:
    with Lab() as lab, pytest.raises(LabError, match="false in host failed"):
        lab.add_host("host").run(["false"])


def test_without_the_rights_it_says_so_in_one_sentence() -> None:
    code = "from netlab_parts.lab import Lab\nwith Lab(): pass"
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    nobody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command = [*nobody, sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "needs root" in done.stderr.splitlines()[-1]
