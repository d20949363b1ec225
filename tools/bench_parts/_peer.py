"""One end of a transfer or of a pipe, as a process of its own; told what to do by JSON lines on stdin.

``plain``: a libtorrent session that listens by itself. ``node``: a TorrentLM gateway with its libtorrent session
behind it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import libtorrent as lt
import trio

from torrentlm.gateway.gateway import Gateway
from torrentlm.records import Endpoint, InfoHash, SessionId
from torrentlm.swarm.identity import Identity
from torrentlm.swarm.session import Swarm
from torrentlm.swarm.settings import transfer_settings
from torrentlm.wire.messages import Step, Tensor, Want

TRANSFER_LIMIT = 120.0
EXIT_LIMIT = 30.0
POLL = 0.01
BETWEEN_PINGS = 0.003


class Peer:
    """The parent's side: ``ask`` sends one command and returns its answer."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process
        self.endpoint: str = self._read()["endpoint"]

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a benchmark process ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def peer(*kind: str) -> Iterator[Peer]:
    """A process of this file; ended on the way out."""
    process = Popen([sys.executable, __file__, *kind], stdin=PIPE, stdout=PIPE, text=True)
    try:
        yield Peer(process)
        assert process.stdin is not None
        process.stdin.close()  # the process ends, and libtorrent writes what it has not written yet
        process.wait(EXIT_LIMIT)
    finally:
        process.kill()
        process.wait()


# -- what runs in the process ------------------------------------------------------------------------------------------


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def finished(handles: list[Any]) -> bool:
    """Everything is verified; drops from ``handles`` what is."""
    while handles and handles[-1].status().is_seeding:
        handles.pop()
    return not handles


class Clock:
    """Times a transfer: from the first byte of a piece to the last piece verified."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles
        self._left = list(handles)
        self._asked = time.monotonic()
        self._first: float | None = None

    def wait(self) -> dict[str, float]:
        """Asks libtorrent, which takes its time to answer: not for a thread that has something else to do."""
        while (result := self._poll()) is None:
            time.sleep(POLL)
        return result

    async def run(self) -> dict[str, float]:
        return await trio.to_thread.run_sync(self.wait, abandon_on_cancel=True)

    def _poll(self) -> dict[str, float] | None:
        now = time.monotonic()
        if self._first is None and any(handle.status().total_payload_download for handle in self._handles):
            self._first = now
        if self._first is not None and finished(self._left):
            return {"first_byte_s": self._first - self._asked, "seconds": time.monotonic() - self._first}
        if now - self._asked > TRANSFER_LIMIT:
            raise RuntimeError("the transfer does not come to an end")
        return None


def plain() -> None:
    """The reference."""
    quiet = {"enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False}
    tcp_only = {"enable_incoming_utp": False, "enable_outgoing_utp": False, "allow_multiple_connections_per_ip": True}
    session = lt.session(transfer_settings() | quiet | tcp_only | {"listen_interfaces": "127.0.0.1:0", "alert_mask": 0})
    say(endpoint=f"127.0.0.1:{session.listen_port()}")
    handles: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "add":
            for path in command["torrents"]:
                params = lt.load_torrent_buffer(Path(path).read_bytes())
                params.save_path = command["folder"]
                seeds = lt.torrent_flags.seed_mode | lt.torrent_flags.no_verify_files
                params.flags = seeds if command["verified"] else 0
                handles.append(session.add_torrent(params))
            say(done=True)
        elif command["do"] == "fetch":
            target = Endpoint.parse(command["peer"])
            clock = Clock(handles)
            for handle in handles:
                handle.connect_peer((target.host, target.port), 0, 0)
            say(**clock.wait())
        elif command["do"] == "cpu":
            say(seconds=time.process_time(), gateway_s=time.thread_time())


async def node() -> None:
    """Ours."""
    async with trio.open_nursery() as nursery:
        identity = Identity.generate()
        gateway = Gateway(identity, host="127.0.0.1")
        await nursery.start(gateway.run)
        swarm = Swarm(gateway.proxy, identity, ())
        await nursery.start(swarm.run)
        gateway.torrents = swarm
        nursery.start_soon(echo_all, gateway)
        say(endpoint=str(gateway.endpoint))
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            await obey(json.loads(line), gateway, swarm)
        nursery.cancel_scope.cancel()


async def obey(command: dict[str, Any], gateway: Gateway, swarm: Swarm) -> None:
    if command["do"] == "add":
        for path in command["torrents"]:
            torrent = await trio.Path(path).read_bytes()
            swarm.add_torrent(torrent, Path(command["folder"]), verified=command["verified"])
        say(done=True)
    elif command["do"] == "fetch":
        target = Endpoint.parse(command["peer"])
        clock = Clock([transfer.handle for transfer in swarm.transfers])
        for transfer in swarm.transfers:
            transfer.connect_peer(target)
        say(**await clock.run())
    elif command["do"] == "cpu":
        say(seconds=time.process_time(), gateway_s=time.thread_time())
    elif command["do"] == "idle":
        say(times=await ping(gateway, swarm, Endpoint.parse(command["peer"]), command["size"], command["count"]))
    elif command["do"] == "saturated":
        await saturate(gateway, swarm, Endpoint.parse(command["peer"]), command["size"])


async def saturate(gateway: Gateway, swarm: Swarm, target: Endpoint, size: int) -> None:
    """Fetch everything and ping meanwhile, on the same connection."""
    clock = Clock([transfer.handle for transfer in swarm.transfers])
    for transfer in swarm.transfers:
        transfer.connect_peer(target)
    await gateway.incoming.receive()
    times: list[float] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def keep_pinging() -> None:
                while True:
                    times.extend(await ping(gateway, swarm, target, size, 1))
                    await trio.sleep(BETWEEN_PINGS)

            nursery.start_soon(keep_pinging)
            result = await clock.run()
            scope.cancel()
    say(times=times, connections=len(gateway.connections), **result)


async def ping(gateway: Gateway, swarm: Swarm, target: Endpoint, size: int, count: int) -> list[float]:
    """Seconds of each of ``count`` round trips of a message with ``size`` bytes of tensor."""
    pipe = await gateway.pipe_to(target, InfoHash(swarm.transfers[0].info_hashes[0]))
    step = Step(SessionId(bytes(16)), 0, 0, 0, Want.NONE, None, (Tensor("F32", (1, 1, size // 4), bytes(size)),))
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await pipe.send(step, 1)
        await pipe.receive()
        times.append(time.perf_counter() - start)
    return times


async def echo_all(gateway: Gateway) -> None:
    """Only the end that is pinged takes messages here: the other end's pipe is read by ``ping``."""
    if "echo" not in sys.argv:
        return
    async with trio.open_nursery() as nursery:
        async for pipe in gateway.incoming:
            nursery.start_soon(echo, pipe)


async def echo(pipe: Any) -> None:
    while True:
        stream, message = await pipe.receive()
        await pipe.send(message, stream)


async def bare() -> None:
    """The reference for round trips: a trio TCP stream and nothing else."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, bare_echo, listeners)
        say(endpoint=f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            target = Endpoint.parse(command["peer"])
            stream = await trio.open_tcp_stream(target.host, target.port)
            data = bytes(command["size"])
            times = []
            for _ in range(command["count"]):
                start = time.perf_counter()
                await stream.send_all(data)
                left = len(data)
                while left:
                    left -= len(await stream.receive_some(left))
                times.append(time.perf_counter() - start)
            say(times=times)
        nursery.cancel_scope.cancel()


async def bare_echo(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def quantile(times: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))] * 1e3


def median_ms(times: list[float]) -> float:
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    {"plain": plain, "node": lambda: trio.run(node), "bare": lambda: trio.run(bare)}[sys.argv[1]]()
