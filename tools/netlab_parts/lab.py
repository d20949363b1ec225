"""Virtual hosts on this machine: network namespaces joined by a bridge, each with an address and limited rates.

::

    host a                 switch                 host b          each a network namespace of its own
    eth0 10.77.0.1 ══════ a ─┐
       tbf: a's upload       ├─ bridge ─ b ══════ eth0 10.77.0.2  ══ a veth pair
                tbf: a's download ┘  tbf: b's download

No namespace has a way out: nothing connects the switch with the machine's own network. ``with Lab() as lab`` removes
everything at the end, also after an exception, Ctrl-C or a termination; what a killed one left is removed by the next.

How exact: ``measured_rate`` says what one TCP stream reaches. ``tbf`` counts whole Ethernet frames, so that of a rate
of 100 Mbit/s at most 95.6 are payload (1448 of 1514 bytes), and lets ``BURST_S`` of the rate pass at once.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from netlab_parts import kernel
from netlab_parts.kernel import LabError

from torrentlm.cli.signals import ENDING, exit_on, held_back

BURST_S = 0.005
MIN_BURST = 16_000
"""Bytes; less than a few frames would make tbf slower than its rate."""
QUEUE_S = 0.05
"""A full queue at the link delays by so much; what comes then is dropped, as a router would."""
GRACE_S = 8.0
"""How long programs have to stop by themselves before they are killed."""
PAYLOAD = 1448 / 1514
"""Of a full Ethernet frame's bytes those that TCP carries, with timestamps."""
_NAME = re.compile(r"[a-z0-9-]{1,12}")


@dataclass(frozen=True, slots=True)
class Host:
    """One virtual host. Rates in bits per second, None for no limit."""

    lab: Lab
    name: str
    address: str
    namespace: str

    def limit(self, up: int | None = None, down: int | None = None) -> None:
        """Set both directions' rates; a running transfer feels it at once."""
        _shape(self.namespace, "eth0", up)
        _shape(self.lab.switch, self.name, down)

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in this host, in a session of its own; ``options`` are Popen's. It ends with the lab."""
        return self.lab.start(self, arguments, options)

    def run(self, arguments: Sequence[str], timeout: float = 60) -> str:
        """Run a program in this host to its end and return what it prints; LabError if it fails."""
        process = self.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            printed, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(process, grace=0)
            raise LabError(f"{arguments[0]} in {self.name} took more than {timeout:.0f} s") from None
        if process.returncode:
            raise LabError(f"{arguments[0]} in {self.name} failed: {said.strip()}")
        return str(printed)

    def traffic(self) -> tuple[int, int]:
        """Bytes that went up and down so far, frames counted whole."""
        folder = "/sys/class/net/eth0/statistics"
        up, down = self.run(["cat", f"{folder}/tx_bytes", f"{folder}/rx_bytes"]).split()
        return int(up), int(down)


class Lab:
    """Hosts on one bridge. ``subnet`` may be any: nothing outside sees it."""

    def __init__(self, name: str = "lab", subnet: str = "10.77.0.0/24") -> None:
        self.subnet = ipaddress.ip_network(subnet)
        self.hosts: dict[str, Host] = {}
        self.switch = kernel.namespace(name, "switch")
        self.grace = GRACE_S
        self._name = name
        self._addresses = self.subnet.hosts()
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._before: dict[int, Any] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For torrentlm in the hosts: it talks to nothing but the lab's subnet and the host's own loopback."""
        return {"TORRENTLM_LOOPBACK_ONLY": "1", "TORRENTLM_ALLOWED_NETS": str(self.subnet), "HF_HUB_OFFLINE": "1"}

    def __enter__(self) -> Lab:
        self._before = {number: signal.signal(number, exit_on) for number in ENDING[1:]}
        try:
            with held_back():
                kernel.remove(kernel.stale())
                self._add_namespace(self.switch)
                kernel.command("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
                kernel.command("ip", "-n", self.switch, "link", "set", "bridge", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held_back():
            self.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def add_host(self, name: str, up: int | None = None, down: int | None = None) -> Host:
        """A new host with the subnet's next address; rates in bits per second."""
        if not _NAME.fullmatch(name) or name in self.hosts or name == "bridge":
            raise LabError(
                f"{name!r} cannot be a new host's name: up to 12 small letters, digits and dashes, each once"
            )
        try:
            address = next(self._addresses)
        except StopIteration:
            raise LabError(f"{self.subnet} has no address left for {name}") from None
        host = Host(self, name, str(address), kernel.namespace(self._name, name))
        with held_back():
            self._add_namespace(host.namespace)
            inside, outside = ("-n", host.namespace), ("-n", self.switch)
            kernel.command(
                *(
                    "ip",
                    *outside,
                    "link",
                    "add",
                    "name",
                    name,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host.namespace,
                )
            )
            kernel.command("ip", *outside, "link", "set", "dev", name, "master", "bridge", "up")
            kernel.command("ip", *inside, "address", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0")
            kernel.command("ip", *inside, "link", "set", "eth0", "up")
            self.hosts[name] = host
        host.limit(up, down)
        return host

    def start(self, host: Host, arguments: Sequence[str], options: Mapping[str, Any]) -> subprocess.Popen[Any]:
        words = ["ip", "netns", "exec", host.namespace, *arguments]
        given = dict(options)
        environment = {**os.environ, **self.environment, **given.pop("env", {}), "PATH": kernel.PATH}
        with held_back():
            process = subprocess.Popen(
                words, **{"stdin": subprocess.DEVNULL, **given}, env=environment, start_new_session=True
            )
            self._processes.append(process)
        return process

    def close(self) -> None:
        """End what was started, first kindly, and remove every namespace."""
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + self.grace
        for process in running:
            end(process, grace=max(0.0, deadline - time.monotonic()))
        kernel.remove(self._namespaces)
        self._namespaces, self._processes, self.hosts = [], [], {}

    def _add_namespace(self, name: str) -> None:
        self._namespaces.append(name)  # first: what is half made goes, too
        kernel.command("ip", "netns", "add", name)
        kernel.command("ip", "-n", name, "link", "set", "lo", "up")


def end(process: subprocess.Popen[Any], grace: float = GRACE_S) -> None:
    """Terminate a host's program, kill it after ``grace`` seconds, and wait for it."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _signal(process, signal.SIGKILL)
    process.wait()


def measured_rate(sender: Host, receiver: Host, seconds: float = 2.0) -> float:
    """Payload of one TCP stream, in bits per second, at the receiver."""
    script = str(Path(__file__).with_name("stream.py"))
    listening = receiver.start([sys.executable, script, "receive", receiver.address], stdout=subprocess.PIPE, text=True)
    assert listening.stdout is not None
    try:
        port = listening.stdout.readline().strip()
        sender.run([sys.executable, script, "send", receiver.address, port, str(seconds)], timeout=seconds + 30)
        return float(listening.stdout.readline())
    except ValueError:
        raise LabError(f"no stream from {sender.name} to {receiver.name} came about") from None
    finally:
        end(listening, grace=0)
        listening.stdout.close()


def _shape(namespace: str, device: str, rate: int | None) -> None:
    if rate is None:
        with contextlib.suppress(LabError):  # it had no limit
            kernel.command("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")
        return
    burst = max(MIN_BURST, int(rate / 8 * BURST_S))
    limits = ("rate", f"{rate}bit", "burst", f"{burst}b", "latency", f"{QUEUE_S * 1000:.0f}ms")
    kernel.command("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limits)


def _signal(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
