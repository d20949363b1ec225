"""libtorrent's settings for a node: everything through the gateway's SOCKS5 proxy, nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import libtorrent as lt

from torrentlm.records import Endpoint

Settings = dict[str, Any]

PUBLIC_BOOTSTRAP = (
    Endpoint("router.bittorrent.com", 6881),
    Endpoint("dht.libtorrent.org", 25401),
    Endpoint("router.utorrent.com", 6881),
    Endpoint("dht.transmissionbt.com", 6881),
)
"""The DHT's well-known entrances, used unless the operator names others."""

TICK_MS = 20
"""How often libtorrent looks at its clock; ``Swarm`` hurries it by this."""
IDLE_TICK_MS = 500
"""The same while nothing comes or goes."""

_SOCKS5_WITH_PASSWORD = int(lt.proxy_type_t.socks5_pw)
_ENCRYPTION_OFF = int(lt.enc_policy.pe_disabled)


class Proxy(NamedTuple):
    """The gateway's SOCKS5 port, loopback only, with a password made per process."""

    host: str
    port: int
    user: str
    password: str


def transfer_settings() -> Settings:
    """What makes block files move fast between few, fast, trusted-by-hash peers; plain settings, no network policy."""
    return {
        # Every torrent of a model runs at once; nothing is queued behind libtorrent's defaults of 3 and 5.
        "active_downloads": -1,
        "active_seeds": -1,
        "active_limit": -1,
        "active_dht_limit": -1,
        "active_checking": 4,
        "connections_limit": 2000,
        "connection_speed": 500,
        "unchoke_slots_limit": -1,
        "tick_interval": TICK_MS,
        "min_reconnect_time": 2,
        "max_failcount": 31,
        "request_queue_time": 1,
        "initial_picker_threshold": 0,
        # Bigger queues than for home lines: the other end may be on loopback or a fast network.
        "max_out_request_queue": 1500,
        "max_allowed_in_request_queue": 2000,
        "send_buffer_watermark": 3 << 20,
        "send_not_sent_low_watermark": 512 << 10,
        "max_queued_disk_bytes": 64 << 20,
        "file_pool_size": 500,
        "hashing_threads": 2,
        # Five pieces for each choked peer would be most of a copy more (gateway/turns.py).
        "allowed_fast_set_size": 0,
    }


def session_settings(proxy: Proxy, bootstrap: Sequence[Endpoint] = PUBLIC_BOOTSTRAP) -> Settings:
    """Everything for a session behind ``proxy``; ``bootstrap`` other than the public list means a private network."""
    settings = transfer_settings() | _isolation(proxy) | _dht(bootstrap)
    settings["alert_mask"] = int(
        lt.alert_category.error
        | lt.alert_category.status
        | lt.alert_category.storage
        | lt.alert_category.dht
        | lt.alert_category.dht_operation
    )
    settings["alert_queue_size"] = 10_000
    return settings


def _isolation(proxy: Proxy) -> Settings:
    """No way out but the proxy: peers, trackers, names and the DHT's packets all go through it."""
    return {
        "proxy_type": _SOCKS5_WITH_PASSWORD,
        "proxy_hostname": proxy.host,
        "proxy_port": proxy.port,
        "proxy_username": proxy.user,
        "proxy_password": proxy.password,
        "proxy_peer_connections": True,
        "proxy_tracker_connections": True,
        "proxy_hostnames": True,
        # So that the relay knows where to send what comes in before the DHT itself has spoken.
        "socks5_udp_send_local_ep": True,
        # Proxied, libtorrent opens no TCP listener; its UDP socket drops whatever the proxy did not send.
        "listen_interfaces": "127.0.0.1:0",
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_lsd": False,
        "enable_ip_notifier": False,
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        # This leg is loopback to the gateway, which reads the peer wire; towards the network the gateway decides.
        "out_enc_policy": _ENCRYPTION_OFF,
        "in_enc_policy": _ENCRYPTION_OFF,
        # Several nodes of one machine or one NAT share an address.
        "allow_multiple_connections_per_ip": True,
        "webtorrent_stun_server": "",
    }


def _dht(bootstrap: Sequence[Endpoint]) -> Settings:
    public = tuple(bootstrap) == PUBLIC_BOOTSTRAP
    return {
        "enable_dht": True,
        # A private network's entrances are added as nodes: they are peers like all others, not routers.
        "dht_bootstrap_nodes": ",".join(map(str, bootstrap)) if public else "",
        # One node per address protects the public DHT; privately many nodes share 127.0.0.1 or a /24.
        "dht_restrict_routing_ips": public,
        "dht_restrict_search_ips": public,
        "dht_ignore_dark_internet": public,
        "dht_prefer_verified_node_ids": public,
        # Packets per second and address before it is blocked: privately one address is many nodes.
        "dht_block_ratelimit": 5 if public else 10_000,
        # A model announces twice (v1, v2) per block: the default of 8 kB/s would take minutes.
        "dht_upload_rate_limit": 64_000 if public else 1_000_000,
    }
