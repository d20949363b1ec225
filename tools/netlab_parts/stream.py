"""One TCP stream, run in a lab's hosts: ``receive ADDRESS`` prints its port, then bits per second; ``send ADDRESS PORT
SECONDS`` fills it.
"""

from __future__ import annotations

import socket
import sys
import time

CHUNK = bytes(64 * 1024)
WARM_UP_S = 0.5
"""At the beginning, while buffers fill and TCP finds its pace, nothing is counted."""


def receive(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        server.settimeout(20)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(20)
        buffer = bytearray(len(CHUNK))
        began = counting = last = time.monotonic()
        total = 0
        while count := connection.recv_into(buffer):
            last = time.monotonic()
            if last - began < WARM_UP_S:
                counting = last
            else:
                total += count
    print(total * 8 / max(last - counting, 1e-6), flush=True)


def send(address: str, port: int, seconds: float) -> None:
    with socket.create_connection((address, port), timeout=20) as connection:
        until = time.monotonic() + WARM_UP_S + seconds
        while time.monotonic() < until:
            connection.sendall(CHUNK)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
