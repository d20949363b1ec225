"""The node's one public port: TCP and UDP under the same number."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from torrentlm.errors import NetworkError
from torrentlm.gateway import tcp
from torrentlm.records import Endpoint

_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Ports:
    """Both sockets bound to ``endpoint``; TCP listens already."""

    endpoint: Endpoint
    tcp: socket.socket
    udp: socket.socket

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()


def open_ports(host: str, port: int) -> Ports:
    """Bind both. Port 0 takes a pair that is free. NetworkError with one sentence if it cannot be."""
    for _ in range(_ATTEMPTS if port == 0 else 1):
        try:
            return _open_pair(host, port)
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRINUSE:
                break
    if failure.errno == errno.EADDRINUSE:
        raise NetworkError(f"Port {port} is in use by another program; choose another with --port, or 0 for any.")
    raise NetworkError(f"This node cannot listen on {host} port {port}: {failure.strerror or failure}.")


def _open_pair(host: str, port: int) -> Ports:
    listener = tcp.listen(host, port)
    try:
        bound = Endpoint(host, listener.getsockname()[1])
        udp = socket.socket(listener.family, socket.SOCK_DGRAM)
        try:
            udp.setblocking(False)
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            udp.bind((host, bound.port))
        except BaseException:
            udp.close()
            raise
    except BaseException:
        listener.close()
        raise
    return Ports(bound, listener, udp)
