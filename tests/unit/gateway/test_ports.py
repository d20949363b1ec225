from __future__ import annotations

import socket

import pytest

from torrentlm.errors import NetworkError
from torrentlm.gateway.ports import open_ports


def test_tcp_and_udp_have_the_same_number() -> None:
    ports = open_ports("127.0.0.1", 0)
    try:
        assert ports.tcp.getsockname() == ports.udp.getsockname() == ("127.0.0.1", ports.endpoint.port)
    finally:
        ports.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_in_use_is_said_in_one_sentence(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(NetworkError, match=rf"^Port {port} is in use [^.]*\.$"):
            open_ports("127.0.0.1", port)
        if kind is socket.SOCK_DGRAM:
            with socket.socket() as free:
                free.bind(("127.0.0.1", port))  # the TCP half was given back


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(NetworkError, match=r"^This node cannot listen on 192\.0\.2\.1 port 0: [^.]*\.$"):
        open_ports("192.0.2.1", 0)
