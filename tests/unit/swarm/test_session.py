"""The session itself: its settings, its limits, its end. What it does with peers is in tests/swarm."""

from __future__ import annotations

import subprocess
import sys

import libtorrent as lt
import trio

from tests.loopback import is_loopback
from torrentlm.records import Endpoint
from torrentlm.swarm.addresses import resolve
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.settings import PUBLIC_BOOTSTRAP, Proxy, session_settings, transfer_settings

NOBODY = Proxy("127.0.0.1", 9, "user", "password")


def test_settings_are_libtorrents() -> None:
    """A misspelt name would be an error only when a session is made; a wrong type not even then."""
    defaults = lt.default_settings()
    for name, value in (session_settings(NOBODY) | transfer_settings()).items():
        assert type(defaults.get(name, "")) is type(value), name


def test_nothing_but_the_proxy() -> None:
    settings = session_settings(NOBODY)
    assert settings["proxy_type"] == lt.proxy_type_t.socks5_pw
    assert all(settings[f"proxy_{what}"] for what in ("peer_connections", "tracker_connections", "hostnames"))
    assert not any(settings[f"enable_{what}"] for what in ("upnp", "natpmp", "lsd", "outgoing_utp", "incoming_utp"))
    assert is_loopback(settings["listen_interfaces"].partition(":")[0])


def test_private_network_relaxes_what_protects_the_public_dht() -> None:
    public, private = session_settings(NOBODY), session_settings(NOBODY, [Endpoint("127.0.0.1", 7000)])
    for name in ("dht_restrict_routing_ips", "dht_restrict_search_ips", "dht_ignore_dark_internet"):
        assert (public[name], private[name]) == (True, False)
    assert public["dht_bootstrap_nodes"].split(",") == [str(node) for node in PUBLIC_BOOTSTRAP]
    assert private["dht_bootstrap_nodes"] == ""


def test_told_to_stay_here_it_looks_up_no_public_names() -> None:
    async def main() -> None:
        swarm = Swarm(NOBODY, Identity.generate())
        async with trio.open_nursery() as nursery:
            await nursery.start(swarm.run)
            assert swarm._session.get_settings()["dht_bootstrap_nodes"] == ""
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_limits_bind_local_peers_too() -> None:
    async def main() -> None:
        swarm = Swarm(NOBODY, Identity.generate(), (), download_limit=1_000_000, upload_limit=2_000_000)
        async with trio.open_nursery() as nursery:
            await nursery.start(swarm.run)
            session = swarm._session
            for peers in (session.local_peer_class_id, session.global_peer_class_id):
                limits = session.get_peer_class(peers)
                assert (limits["download_limit"], limits["upload_limit"]) == (1_000_000, 2_000_000)
            nursery.cancel_scope.cancel()

    trio.run(main)


RUN_TWICE = """
from pathlib import Path
import trio
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.settings import Proxy

def resources():
    return [len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")]

async def run_once():
    swarm = Swarm(Proxy("127.0.0.1", 9, "user", "password"), Identity.generate(), ())
    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.run)
        during = resources()
        nursery.cancel_scope.cancel()
    return during

trio.run(run_once)  # trio keeps its worker thread for a while
before = resources()
during = trio.run(run_once)
print(during > before, resources() == before)
"""


def test_end_leaves_no_thread_and_no_socket() -> None:
    """In a process of its own: here, threads of other tests come to their end meanwhile."""
    child = subprocess.run([sys.executable, "-c", RUN_TWICE], capture_output=True, text=True, timeout=60)
    assert (child.stdout, child.stderr) == ("True True\n", "")


def test_names_are_looked_up_here_and_only_if_allowed() -> None:
    endpoints = [
        Endpoint("127.0.0.1", 1),
        Endpoint("localhost", 2),
        Endpoint("example.org", 3),
        Endpoint("192.0.2.1", 4),
    ]
    found = trio.run(resolve, endpoints)
    assert Endpoint("127.0.0.1", 1) in found
    assert Endpoint("127.0.0.1", 2) in found
    assert Endpoint("192.0.2.1", 4) in found
    assert not any(endpoint.port == 3 for endpoint in found)
