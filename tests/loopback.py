"""Keeps the tests on this machine: nothing in the test process may reach or look up anything beyond loopback.

Three nets. The environment, which child processes inherit, makes our own programs refuse. An audit hook sees every
connect, datagram and name lookup of Python's sockets. ``GuardedSession`` stands in for ``libtorrent.session``, whose
sockets Python never sees: it refuses settings that would leave loopback and filters all other addresses. A refusal is
raised on the spot and remembered too, so that a test fails even if the code under test swallows the exception.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import libtorrent as lt

ENVIRONMENT = {"TORRENTLM_LOOPBACK_ONLY": "1", "HF_HUB_OFFLINE": "1"}

QUIET: dict[str, Any] = {
    "listen_interfaces": "127.0.0.1:0",
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_lsd": False,
    "enable_dht": False,
    "dht_bootstrap_nodes": "",
    "webtorrent_stun_server": "",
    "allow_multiple_connections_per_ip": True,
}
"""Settings of a libtorrent session that does nothing by itself."""

_refusals: list[str] = []


class LeakError(RuntimeError):
    """Something in the test process tried to leave loopback."""


def install() -> None:
    """Spread the nets, once, before anything else is imported."""
    os.environ.update(ENVIRONMENT)
    if not issubclass(lt.session, GuardedSession):
        lt.session = GuardedSession  # type: ignore[misc]
        sys.addaudithook(_audit)


def take_refusals() -> list[str]:
    """What was refused since the last call."""
    taken = _refusals.copy()
    _refusals.clear()
    return taken


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """For tests of the guard itself: the body must be refused, and that is no failure."""
    try:
        yield
    except LeakError:
        assert take_refusals()
    else:
        raise AssertionError("the guard let it pass")


def leaks(settings: Mapping[str, Any]) -> list[str]:
    """Which of a libtorrent session's settings would leave loopback; those not given count with their defaults."""
    effective = {**lt.default_settings(), **settings}
    found = [name for name in ("enable_upnp", "enable_natpmp", "enable_lsd") if effective[name]]
    found += [f"listen_interfaces {text}" for text in _hosts(effective["listen_interfaces"]) if not is_loopback(text)]
    if effective["enable_dht"]:
        nodes = _hosts(effective["dht_bootstrap_nodes"])
        found += [f"dht_bootstrap_nodes {text}" for text in nodes if not is_loopback(text)]
    if effective["proxy_type"] and not is_loopback(effective["proxy_hostname"]):
        found.append(f"proxy_hostname {effective['proxy_hostname']}")
    return found


def is_loopback(host: object) -> bool:
    """Whether the host is a loopback address, or a name that is one by definition."""
    text = host.decode() if isinstance(host, bytes) else host
    if not isinstance(text, str):
        return False
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return text == "localhost"


class GuardedSession(lt.session):  # type: ignore[misc]
    """``libtorrent.session`` that cannot leave loopback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("settings", kwargs.get("params", {}))
        settings = given.settings if isinstance(given, lt.session_params) else given
        if not isinstance(settings, dict):
            _refuse("a libtorrent session without settings")
        _check(settings)
        super().__init__(*args, **kwargs)
        super().set_ip_filter(_loopback_filter())

    def apply_settings(self, settings: dict[str, Any]) -> None:
        _check({**self.get_settings(), **settings})
        super().apply_settings(settings)

    def set_ip_filter(self, ip_filter: Any) -> None:
        _refuse("another IP filter")

    def _refuse_legacy(self, *args: Any, **kwargs: Any) -> None:
        _refuse("a deprecated method that changes settings")

    start_upnp = start_natpmp = start_lsd = start_dht = listen_on = load_state = set_proxy = _refuse_legacy


def _check(settings: Mapping[str, Any]) -> None:
    if found := leaks(settings):
        _refuse("a libtorrent session with " + ", ".join(found))


def _refuse(what: str) -> None:
    _refusals.append(what)
    raise LeakError(f"{what} would leave loopback; tests stay on this machine")


def _hosts(endpoints: str) -> list[str]:
    """The hosts of ``host:port,[v6]:port,…``."""
    hosts = [endpoint.strip().rpartition(":")[0] for endpoint in endpoints.split(",") if endpoint.strip()]
    return [host.removeprefix("[").removesuffix("]") for host in hosts]


def _loopback_filter() -> Any:
    ip_filter = lt.ip_filter()
    for first, last in (
        ("0.0.0.0", "126.255.255.255"),
        ("128.0.0.0", "255.255.255.255"),
        ("::", "::"),
        ("::2", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ):
        ip_filter.add_rule(first, last, 1)
    return ip_filter


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not is_loopback(address[0]):
            _refuse(f"{event} to {address[0]!r}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
        if host and not is_loopback(host) and not _is_number(host):
            _refuse(f"{event} of {host!r}")


def _is_number(host: object) -> bool:
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
