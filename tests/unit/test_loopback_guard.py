"""The guard of tests/loopback.py, tested like anything else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import libtorrent as lt
import pytest

from tests.loopback import QUIET, LeakError, leaks, refused, take_refusals

LEAKS: list[dict[str, Any]] = [
    {"enable_upnp": True},
    {"enable_natpmp": True},
    {"enable_lsd": True},
    {"listen_interfaces": "0.0.0.0:0"},
    {"listen_interfaces": "127.0.0.1:0,[::]:0"},
    {"listen_interfaces": "eth0:6881"},
    {"enable_dht": True, "dht_bootstrap_nodes": "192.0.2.1:6881"},
    {"enable_dht": True, "dht_bootstrap_nodes": "127.0.0.1:1,dht.example.org:6881"},
    {"proxy_type": 3, "proxy_hostname": "192.0.2.1"},
]


@pytest.mark.parametrize("change", LEAKS, ids=str)
def test_settings_that_leave_loopback_are_refused(change: dict[str, Any]) -> None:
    assert leaks(QUIET | change)
    with refused():
        lt.session(QUIET | change)
    params = lt.session_params()
    params.settings = QUIET | change
    with refused():
        lt.session(params)


def test_defaults_are_refused() -> None:
    assert len(leaks({})) >= 5
    for arguments in ((), ({},), (lt.session_params(),)):
        with refused():
            lt.session(*arguments)


def test_settings_cannot_be_widened_later(plain_session: Callable[..., Any]) -> None:
    session = plain_session()
    for change in LEAKS:
        with refused():
            session.apply_settings(change)
    session.apply_settings({"alert_queue_size": 100})
    for widen in (session.start_lsd, session.start_upnp, lambda: session.listen_on(6881, 6882)):
        with refused():
            widen()


def test_other_addresses_are_filtered(plain_session: Callable[..., Any]) -> None:
    access = plain_session().get_ip_filter().access
    assert access("127.0.0.1") == access("127.3.2.1") == access("::1") == 0
    assert all(access(host) for host in ("192.0.2.1", "0.0.0.0", "10.0.0.1", "255.255.255.255", "::", "2001:db8::1"))
    with refused():
        plain_session().set_ip_filter(lt.ip_filter())


def test_python_sockets_stay_on_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.sendto(b"", ("127.0.0.1", 9))
        with refused():
            datagrams.sendto(b"", ("192.0.2.1", 9))
        with refused():
            datagrams.connect(("192.0.2.1", 9))
    socket.getaddrinfo("localhost", 80)
    socket.getaddrinfo("192.0.2.1", 80)
    with refused():
        socket.getaddrinfo("example.org", 80)


def test_swallowed_refusal_is_remembered() -> None:
    with pytest.raises(LeakError, match="tests stay on this machine"):
        lt.session({**QUIET, "enable_lsd": True})
    assert take_refusals() == ["a libtorrent session with enable_lsd"]
    assert take_refusals() == []


def test_children_are_told() -> None:
    show = "import os; print(os.environ['TORRENTLM_LOOPBACK_ONLY'], os.environ['HF_HUB_OFFLINE'])"
    assert subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout == "1 1\n"
    assert os.environ["TORRENTLM_LOOPBACK_ONLY"] == "1"
